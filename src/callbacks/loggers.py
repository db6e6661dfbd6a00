"""Fixes Composer's loggers: they log exact values, and a run that is started again keeps its earlier logs."""

import json
import os
import re
import textwrap
from hashlib import sha256
from io import TextIOWrapper
from typing import Any, Optional

from composer import loggers
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist, format_name_with_dist

from src.common.errors import UserError, first_line
from src.config.schema import Plugins


def _json(value: Any, indent: Optional[int] = None) -> str:
    """A value as JSON without rounding: a tensor as a number, an object that JSON does not know as text."""
    return json.dumps(value, indent=indent, ensure_ascii=False,
                      default=lambda v: v.item() if hasattr(v, 'item') else str(v))


class FileLogger(loggers.FileLogger):
    """Composer's FileLogger with a file for each start of a run: `log.txt`, `log.2.txt`, `log.3.txt`.

    Composer's own would empty the earlier file, and would round values to four decimals. Each value is a line in JSON,
    as in `[metric][batch=5]: loss/train/total: 3.25`.
    """

    def log_metrics(self, metrics: dict[str, float], step: Optional[int] = None) -> None:
        for name, value in metrics.items():
            self._line(f'[metric][batch={step}]: {name}: {_json(value)}')

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        for name, value in hyperparameters.items():
            self._line(f'[hyperparameter]: {name}: {_json(value)}')

    def log_table(self, columns: list[str], rows: list[list[Any]], name: str = 'Table',
                  step: Optional[int] = None) -> None:
        self._line(f'[table][batch={step}]: {name}: {_json([dict(zip(columns, row)) for row in rows])}')

    def _line(self, text: str) -> None:
        # Printed output may have stopped in the middle of a line
        self.write('', ('' if self._is_newline else '\n') + text + '\n')

    def init(self, state: State, logger: Logger) -> None:
        stem, ending = os.path.splitext(self.filename_format)
        if dist.get_global_rank() and '{rank}' not in self.filename_format:  # else it would write into rank 0's file
            stem += '-rank{rank}'
            self.filename_format = stem + ending
        start = 1
        while os.path.exists(format_name_with_dist(self.filename_format, state.run_name)):
            start += 1
            self.filename_format = f'{stem}.{start}{ending}'
        super().init(state, logger)

    def _flush_queue(self) -> None:
        # Composer opens the file in the locale's encoding.
        if isinstance(self.file, TextIOWrapper) and self.file.encoding != 'utf-8':
            self.file.reconfigure(encoding='utf-8')
        super()._flush_queue()


class TensorboardLogger(loggers.TensorboardLogger):
    """Composer's TensorboardLogger that also writes hyperparameters and tables as JSON text.

    Composer's own rounds hyperparameters, and writes them at the first evaluation.
    """

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        super().log_hyperparameters(hyperparameters)
        self._waiting: dict[str, Any] = {**getattr(self, '_waiting', {}), **hyperparameters}
        if self.writer is not None:
            self._text('hyperparameters', self._waiting, 0)
            self._waiting = {}

    def log_table(self, columns: list[str], rows: list[list[Any]], name: str = 'Table',
                  step: Optional[int] = None) -> None:
        self._text(name, [dict(zip(columns, row)) for row in rows], step)

    def _text(self, name: str, value: Any, step: Optional[int]) -> None:
        if self.writer is not None and not (self.rank_zero_only and dist.get_global_rank()):
            code = textwrap.indent(_json(value, indent=1), '    ')  # Markdown shows indented text as code
            self.writer.add_text(name, code, step)


class WandBLogger(loggers.WandBLogger):
    """Composer's WandBLogger that lets a resumed run change settings; Composer's own would end such a run."""

    def init(self, state: State, logger: Logger) -> None:
        import wandb.errors
        try:
            super().init(state, logger)
        except wandb.errors.Error as e:
            raise UserError(f'loggers.wandb: {first_line(e)}; set WANDB_API_KEY, or WANDB_MODE=offline') from e

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        if self._enabled:
            import wandb
            wandb.config.update(hyperparameters, allow_val_change=True)


def resume_wandb(chosen: Plugins, run_name: str, save_folder: str) -> Plugins:
    """Adds an id to the settings of W&B, so that all starts of a run log to one W&B run. An id in the YAML stays."""
    wandb = chosen.get('wandb', False)
    if wandb is False:
        return chosen
    save_folder = save_folder if '://' in save_folder else os.path.abspath(save_folder)
    shown_name = re.sub(r'[^A-Za-z0-9_-]', '-', run_name)[:48]
    resume = {'id': f'{shown_name}-{sha256(save_folder.encode()).hexdigest()[:8]}', 'resume': 'allow'}
    kwargs: dict[str, Any] = dict(wandb or {})
    kwargs['init_kwargs'] = resume | (kwargs.get('init_kwargs') or {})
    return {**chosen, 'wandb': kwargs}

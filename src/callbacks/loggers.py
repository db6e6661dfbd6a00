"""Composer's loggers, mended: what they are given is kept exactly, and no start empties what another wrote."""

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
    """What a logger is given, exactly: a tensor as its number, what JSON does not know as text."""
    return json.dumps(value, indent=indent, ensure_ascii=False,
                      default=lambda v: v.item() if hasattr(v, 'item') else str(v))


class FileLogger(loggers.FileLogger):
    """Composer's, which would empty the file of the start before: each start writes its own, `log.2.txt`, `log.3.txt`.

    A line for each value, in JSON, where Composer's would round to four decimals, as in
    `[metric][batch=5]: loss/train/total: 3.25`.
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
        # What is printed may stop in the middle of a line
        self.write('', ('' if self._is_newline else '\n') + text + '\n')

    def init(self, state: State, logger: Logger) -> None:
        stem, ending = os.path.splitext(self.filename_format)
        if dist.get_global_rank() and '{rank}' not in self.filename_format:  # or it would write into rank 0's
            stem += '-rank{rank}'
            self.filename_format = stem + ending
        start = 1
        while os.path.exists(format_name_with_dist(self.filename_format, state.run_name)):
            start += 1
            self.filename_format = f'{stem}.{start}{ending}'
        super().init(state, logger)

    def _flush_queue(self) -> None:
        # Composer opens the file in the encoding of the locale.
        if isinstance(self.file, TextIOWrapper) and self.file.encoding != 'utf-8':
            self.file.reconfigure(encoding='utf-8')
        super()._flush_queue()


class TensorboardLogger(loggers.TensorboardLogger):
    """Composer's, whose hyperparameters are rounded and wait for an evaluation; here they and tables are JSON too."""

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
            code = textwrap.indent(_json(value, indent=1), '    ')  # indented, as Markdown has it
            self.writer.add_text(name, code, step)


class WandBLogger(loggers.WandBLogger):
    """Composer's, which would end a run that goes on with another setting or on other devices."""

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
    """Gives W&B an id of the run, so that each start of it goes on in one W&B run; an id of the user's own stays."""
    wandb = chosen.get('wandb', False)
    if wandb is False:
        return chosen
    save_folder = save_folder if '://' in save_folder else os.path.abspath(save_folder)
    shown_name = re.sub(r'[^A-Za-z0-9_-]', '-', run_name)[:48]
    own = {'id': f'{shown_name}-{sha256(save_folder.encode()).hexdigest()[:8]}', 'resume': 'allow'}
    kwargs: dict[str, Any] = dict(wandb or {})
    kwargs['init_kwargs'] = own | (kwargs.get('init_kwargs') or {})
    return {**chosen, 'wandb': kwargs}

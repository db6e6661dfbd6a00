"""Fixes Composer's loggers: they log exact values without a wait for the GPU, and a later start keeps earlier logs."""

import json
import os
import re
import textwrap
from hashlib import sha256
from io import TextIOWrapper
from typing import Any, Optional

from composer import loggers
from composer.core import Callback, Event, State, Time, Timestamp, TimeUnit
from composer.loggers import Logger
from composer.utils import dist, format_name_with_dist

from src.callbacks import step_sums
from src.checkpoints.writer import CheckpointWriter
from src.common.errors import UserError, first_line
from src.config.schema import Plugins


def _json(value: Any, indent: Optional[int] = None) -> str:
    """A value as JSON without rounding: a tensor as a number, an object that JSON does not know as text."""
    return json.dumps(value, indent=indent, ensure_ascii=False,
                      default=lambda v: v.item() if hasattr(v, 'item') else str(v))


class LateLogs(Callback):
    """Holds metrics on a GPU back, and gives them to the loggers when the console prints: a logger that reads a metric
    waits for the GPU.

    The loggers get all metrics in order, each with its own batch; also after each save, and when training ends or fails
    in this process. Where another rank fails, the metrics since the last print are lost. On a CPU, which does not wait,
    the loggers get each metric at once. Must come after all other callbacks.

    `interval` is the interval of the console, such as `50ba`. With a unit that is not `ba` it is 100 batches.
    """

    def __init__(self, interval: str) -> None:
        time = Time.from_timestring(interval)
        self._interval = time.value if time.unit == TimeUnit.BATCH else 100
        self._held: list[tuple[Timestamp, dict[str, Any], Optional[int]]] = []
        self._logger: Optional[Logger] = None
        self._is_first = True

    def fit_start(self, state: State, logger: Logger) -> None:
        if step_sums.reads_wait(state):
            self._state, self._logger, self._log = state, logger, logger.log_metrics
            logger.log_metrics = self._hold

    def _hold(self, metrics: dict[str, Any], step: Optional[int] = None) -> None:
        self._held.append((self._state.timestamp, dict(metrics), step))

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        super().run_event(event, state, logger)
        prints = event == Event.BATCH_END and (self._is_first or int(state.timestamp.batch) % self._interval == 0)
        self._is_first &= event != Event.BATCH_END  # the console prints the first batch of a start, too
        if prints or event in (Event.EVAL_START, Event.EVAL_END, Event.EPOCH_END):
            self._give()
        elif event in (Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT):
            saved = [cb.last_batch for cb in state.callbacks if isinstance(cb, CheckpointWriter)]
            if int(state.timestamp.batch) in saved:  # a run that goes on from there never logs these metrics again
                self._give()
        elif event == Event.FIT_END:
            self.release()

    def _give(self) -> None:
        held, self._held = self._held, []
        if held:
            now = self._state.timestamp
            try:
                for self._state.timestamp, metrics, step in held:
                    self._log(metrics, step)
            finally:
                self._state.timestamp = now

    def release(self) -> None:
        """Gives all metrics to the loggers, which from now on get each metric at once."""
        self._give()
        if self._logger is not None:
            self._logger.log_metrics, self._logger = self._log, None


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

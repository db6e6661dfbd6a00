"""Saves and stops after the batch at hand, when a stop was requested."""

from collections.abc import Callable
from typing import Optional

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from src.ranks.stop import Stopped, StopRequest


class GracefulStop(Callback):
    """Carries out a requested stop: saves after the batch at hand and raises `Stopped`.

    A stop interrupts an evaluation, or skips it. The last of the callbacks, so that all others have seen the batch.

    Args:
        stop: Which signals set, at another moment on every rank.
        save: Saves a checkpoint; called on all ranks, after a batch that this process has trained on. It may be called
            for a batch that is saved already, and while the model is in evaluation mode.
    """

    def __init__(self, stop: StopRequest, save: Optional[Callable[[State, Logger], None]] = None):
        self._stop, self._save = stop, save
        self._agreed = False
        self._trained_from: Optional[int] = None

    def _agree(self, state: State) -> bool:
        requested = state.device.tensor_to_device(torch.tensor([int(self._stop.requested)]))
        dist.all_reduce(requested, 'MAX')
        self._agreed = bool(requested.item())
        return self._agreed

    def _end(self, state: State, logger: Logger) -> None:
        batch = int(state.timestamp.batch)
        if self._save and self._trained_from is not None and batch > self._trained_from:
            self._save(state, logger)
        raise Stopped(f'stopped on request after batch {batch}')

    def fit_start(self, state: State, logger: Logger) -> None:
        self._trained_from = int(state.timestamp.batch)
        self.eval_batch_end(state, logger)

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._agree(state):
            for evaluator in state.evaluators:
                evaluator.eval_interval = lambda state, event: False

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if self._agreed:
            self._end(state, logger)

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        if self._agree(state):
            self._end(state, logger)

"""Saves a checkpoint and stops after the current batch, when a stop was requested."""

from collections.abc import Callable
from typing import Optional

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from src.ranks.stop import Stopped, StopRequest


class GracefulStop(Callback):
    """Stops a run on request: saves after the current batch and raises `Stopped` on all ranks.

    On several GPUs that is the batch after the current one, because the host learns of other ranks' requests one step
    late. A stop interrupts a running evaluation and skips the next one. This callback must be the last one of a run, so
    that all others have seen the batch.

    Args:
        stop: The request. A signal sets it, at a different moment on each rank. In a step NonFiniteGuard tells all
            ranks of it, in an evaluation this callback does.
        save: Saves a checkpoint. It is called on all ranks, if this process has trained on a batch. The batch may be
            saved already, and the model may be in evaluation mode.
    """

    def __init__(self, stop: StopRequest, save: Optional[Callable[[State, Logger], None]] = None):
        self._stop, self._save = stop, save
        self._first_batch: Optional[int] = None  # the batch at which this process began to train

    def _save_and_stop(self, state: State, logger: Logger) -> None:
        batch = int(state.timestamp.batch)
        if self._save and self._first_batch is not None and batch > self._first_batch:
            self._save(state, logger)
        raise Stopped(f'stopped on request after batch {batch}')

    def fit_start(self, state: State, logger: Logger) -> None:
        self._first_batch = int(state.timestamp.batch)
        self.eval_batch_end(state, logger)

    def batch_end(self, state: State, logger: Logger) -> None:
        self._stop.agreed |= self._stop.requested and dist.get_world_size() == 1
        if self._stop.agreed:
            for evaluator in state.evaluators:
                evaluator.eval_interval = lambda state, event: False

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if self._stop.agreed:
            self._save_and_stop(state, logger)

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        requested = state.device.tensor_to_device(torch.tensor([int(self._stop.requested)]))
        dist.all_reduce(requested, 'MAX')
        if requested.item():
            self._save_and_stop(state, logger)

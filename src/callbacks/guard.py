"""Skips the update of a batch whose loss or gradient is not finite."""

import logging
import math
from typing import Any, Optional

import torch
from composer.core import Algorithm, Event, Precision, State
from composer.loggers import Logger

from src.callbacks import step_sums
from src.common.errors import UserError
from src.optimizers import skips_on_device
from src.ranks.stop import StopRequest

log = logging.getLogger('src')


class NonFiniteGuard(Algorithm):
    """Skips the update of a batch whose loss or gradient is nan or infinite, on all ranks.

    The batch counts and the schedule advances. Weights, momentum and clipping do not change. Logs `trainer/grad_norm`,
    before clipping, and `trainer/skipped_batches` when it changes. Under amp_fp16 only the loss is checked: gradients
    often overflow there, and the gradient scaler skips such updates itself.

    On a GPU a fused optimizer skips the update itself, and the host learns of the batch one step later. With another
    optimizer, and under amp_fp16, the host waits for the GPU in each step.

    Raises UserError after `max_in_a_row` skipped batches in a row, and where the optimizer did not compute a loss:
    Composer would go on, and save untrained weights.

    `stop` is the request to stop. The guard tells all ranks of it, in the same all-reduce, by `stop.agreed`.

    Needs the Trainer of src/training/trainer.py. Must be the last algorithm: Composer runs algorithms in reverse order
    at `AFTER_TRAIN_BATCH`, and the guard has to run before clipping, which by an infinite norm would turn the gradients
    into zeros and nans.
    """

    def __init__(self, max_in_a_row: int, stop: Optional[StopRequest] = None):
        self.max_in_a_row, self._stop = max_in_a_row, stop
        self.in_a_row = self.total = 0
        self._results = step_sums.LateReader()

    def state_dict(self) -> dict[str, Any]:
        in_a_row, total = self.in_a_row, self.total
        for _, (_, _, is_good, _) in self._results.peek():  # batches that are trained, but not counted yet
            in_a_row, total = (0, total) if is_good else (in_a_row + 1, total + 1)
        return {'in_a_row': in_a_row, 'total': total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.in_a_row, self.total = state['in_a_row'], state['total']

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.FIT_START, Event.BATCH_START, Event.AFTER_TRAIN_BATCH, Event.BATCH_END, Event.FIT_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.FIT_START:
            assert state.algorithms[-1] is self, f'NonFiniteGuard is the last algorithm, not {state.algorithms[-1]}'
            self._copies = step_sums.gradient_copies(state.model)
            logger.log_metrics({'trainer/skipped_batches': self.total})
        elif event == Event.BATCH_START:
            self._has_loss = False
        elif event == Event.AFTER_TRAIN_BATCH:
            self._has_loss = True
            self._check_batch(state, logger)
        elif event == Event.FIT_END:
            self._count_batches(0, logger)
        elif not self._has_loss:
            raise UserError(f'optimizer: step of {type(state.optimizers[0]).__name__} did not call its closure, which '
                            'computes forward and backward passes; call it first: '
                            'loss = torch.enable_grad()(closure)() if closure else None')

    def _check_batch(self, state: State, logger: Logger) -> None:
        squares, requests = step_sums.sum_step(state, self._copies, bool(self._stop and self._stop.requested))
        loss: Any = state.total_loss_dict['loss/train/total']
        is_late, is_fp16 = step_sums.reads_wait(state), state.precision == Precision.AMP_FP16
        norm: Any = squares.sqrt() if is_late else math.sqrt(squares)  # torch's sqrt is not exact on a CPU
        logger.log_metrics({'trainer/grad_norm': norm})
        is_good = loss.isfinite() & (squares.isfinite() | is_fp16)
        self._results.put(int(state.timestamp.batch) + 1, torch.stack([loss, squares, is_good, requests]))
        if is_late and not is_fp16 and all(map(skips_on_device, state.optimizers)):
            for optimizer in state.optimizers:
                optimizer.found_inf = (~is_good).float()  # pyright: ignore[reportAttributeAccessIssue]
        elif not is_good:
            for p in state.model.parameters():
                p.grad = None
        self._count_batches(int(is_late), logger)

    def _count_batches(self, n_left: int, logger: Logger) -> None:
        """Counts the skipped batches, all but the last `n_left`; raises UserError where they are too many."""
        for batch, (loss, squares, is_good, requests) in self._results.take(n_left):
            if self._stop and requests:
                self._stop.agreed = True
            if is_good:
                self.in_a_row = 0
                continue
            self.in_a_row += 1
            self.total += 1
            logger.log_metrics({'trainer/skipped_batches': self.total})
            text = f'batch {batch}: loss {loss:.4g}, gradient norm {math.sqrt(squares):.4g}'
            log.warning('%s: update skipped (%d in a row, at most %d)', text, self.in_a_row, self.max_in_a_row)
            if self.in_a_row >= self.max_in_a_row:
                raise UserError(f'{text}; {self.in_a_row} batches in a row had a loss or gradient that is not finite: '
                                'lower optimizer.lr, lengthen scheduler.t_warmup, use precision=amp_bf16 or fp32, or '
                                'check the data')

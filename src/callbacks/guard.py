"""Skips the update of a batch whose loss or gradient is not finite."""

import logging
import math
from typing import Any

import torch
from composer.core import Algorithm, Event, Precision, State
from composer.loggers import Logger
from composer.utils import dist, ensure_tuple
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor, Replicate

from src.common.errors import UserError

log = logging.getLogger('src')


def gradient_copies(model: torch.nn.Module) -> int:
    """Number of ranks that hold the same gradient: all under DDP, one under FSDP, the replicas under HSDP."""
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel) and module.sharding_strategy != ShardingStrategy.NO_SHARD:
            group: Any = module.process_group  # the ranks among which FSDP shards: those of a node under HSDP
            return dist.get_world_size() // group.size()
    for p in model.parameters():
        if isinstance(p, DTensor):
            mesh = p.device_mesh
            replicas = math.prod(mesh.size(i) for i, part in enumerate(p.placements) if isinstance(part, Replicate))
            return dist.get_world_size() // mesh.size() * replicas
    return dist.get_world_size()


class NonFiniteGuard(Algorithm):
    """Skips the update of a batch whose loss or gradient is nan or infinite, on all ranks.

    The batch counts and the schedule advances. Weights, momentum and clipping do not change. Logs `trainer/grad_norm`,
    before clipping, and `trainer/skipped_batches` when it changes. Under amp_fp16 only the loss is checked: gradients
    often overflow there, and the gradient scaler skips such updates itself.

    Raises UserError after `max_in_a_row` skipped batches in a row, and where the optimizer did not compute a loss:
    Composer would go on, and save untrained weights.

    Must be the last algorithm: Composer runs algorithms in reverse order at `AFTER_TRAIN_BATCH`, and the guard has to
    run before clipping, which by an infinite norm would turn the gradients into zeros and nans.
    """

    def __init__(self, max_in_a_row: int):
        self.max_in_a_row = max_in_a_row
        self.in_a_row = self.total = 0

    def state_dict(self) -> dict[str, Any]:
        return {'in_a_row': self.in_a_row, 'total': self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.in_a_row, self.total = state['in_a_row'], state['total']

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.FIT_START, Event.BATCH_START, Event.BEFORE_TRAIN_BATCH, Event.AFTER_LOSS,
                         Event.AFTER_TRAIN_BATCH, Event.BATCH_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.FIT_START:
            assert state.algorithms[-1] is self, f'NonFiniteGuard is the last algorithm, not {state.algorithms[-1]}'
            self._copies = gradient_copies(state.model)
            logger.log_metrics({'trainer/skipped_batches': self.total})
        elif event in (Event.BATCH_START, Event.BEFORE_TRAIN_BATCH):  # the latter comes again if memory ran out
            self._losses: list[torch.Tensor] = []
        elif event == Event.AFTER_LOSS:
            losses = [loss.detach().float().mean() for loss in ensure_tuple(state.loss)]
            self._losses.append(torch.stack(losses).sum())
        elif event == Event.AFTER_TRAIN_BATCH:
            self._check_batch(state, logger)
        elif not self._losses:
            raise UserError(f'optimizer: step of {type(state.optimizers[0]).__name__} did not call its closure, which '
                            'computes forward and backward passes; call it first: '
                            'loss = torch.enable_grad()(closure)() if closure else None')

    def _check_batch(self, state: State, logger: Logger) -> None:
        loss, norm = self._loss_and_norm(state)
        logger.log_metrics({'trainer/grad_norm': norm})
        if math.isfinite(loss) and (math.isfinite(norm) or state.precision == Precision.AMP_FP16):
            self.in_a_row = 0
            return
        for p in state.model.parameters():
            p.grad = None
        self.in_a_row += 1
        self.total += 1
        logger.log_metrics({'trainer/skipped_batches': self.total})
        text = f'batch {int(state.timestamp.batch) + 1}: loss {loss:.4g}, gradient norm {norm:.4g}'
        log.warning('%s: update skipped (%d in a row, at most %d)', text, self.in_a_row, self.max_in_a_row)
        if self.in_a_row >= self.max_in_a_row:
            raise UserError(f'{text}; {self.in_a_row} batches in a row had a loss or gradient that is not finite: '
                            'lower optimizer.lr, lengthen scheduler.t_warmup, use precision=amp_bf16 or fp32, or check '
                            'the data')

    def _loss_and_norm(self, state: State) -> tuple[float, float]:
        """Mean loss of all microbatches, and gradient norm of the model; not finite if one rank's is not."""
        grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
                 for p in state.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads).float()
        losses = torch.stack(self._losses)
        sums = torch.stack([norm.to(losses.device) ** 2 / self._copies, losses.sum(), torch.ones_like(losses).sum()])
        dist.all_reduce(sums)
        squares, loss, n_microbatches = sums.tolist()
        return loss / n_microbatches, math.sqrt(squares)

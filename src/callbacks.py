"""What Composer lacks: figures that a run shows, a guard against losses that are not finite, a stop that saves."""

import logging
import math
import sys
from collections.abc import Callable
from typing import Any, Optional

import torch
from composer.core import Algorithm, Callback, Event, Precision, State
from composer.loggers import Logger
from composer.utils import dist, ensure_tuple
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor, Replicate
from torch.utils.data import DistributedSampler
from tqdm import tqdm

from src.batch_size import grad_accum
from src.causal_lm import IGNORE, next_token_targets
from src.errors import UserError
from src.processes import Stopped, StopRequest
from src.progress import progress

log = logging.getLogger('src')


NO_BATCH = ('train_loader: an epoch holds not one full batch for each device and worker; use more data, a smaller '
            'global_train_batch_size, fewer train_loader.num_workers, or train_loader.drop_last=false. A loader of '
            'your own must begin anew each time that it is iterated, which a generator does not')


class StepCounters(Callback):
    """Logs `trainer/grad_accum` (microbatches per step), `trainer/global_step` (of the run) and `trainer/batch_idx` (of the
    epoch) with every batch, and `trainer/devices` at a start.

    Ends a run whose epochs hold no batch: Composer would begin epoch after epoch, for ever. Shows how a resumed run reads up to
    where it was, which Composer does in silence. Warns of a batch of training that has another size than the config
    says.

    Args:
        device_batch: Samples in a batch of this device; None: any.
    """

    _reading: Optional[tqdm] = None

    def __init__(self, device_batch: Optional[int] = None) -> None:
        self._device_batch = device_batch

    def fit_start(self, state: State, logger: Logger) -> None:
        logger.log_metrics({'trainer/devices': dist.get_world_size()})
        if behind := int(state.timestamp.batch_in_epoch):
            self._reading = progress('reading up to the checkpoint', behind + 1, ' batches', delay=2)

    def before_dataloader(self, state: State, logger: Logger) -> None:  # what is after it does not come for what is dropped
        if self._reading is not None:
            self._reading.update()

    def batch_start(self, state: State, logger: Logger) -> None:
        if self._reading is not None:
            self._reading.close()
            self._reading = None
        if self._device_batch is not None:
            self._check_size(len(state.batch['input_ids']), int(state.timestamp.batch_in_epoch))

    def _check_size(self, rows: int, batch_in_epoch: int) -> None:
        asked = self._device_batch
        assert asked is not None
        if rows > asked or (rows < asked and batch_in_epoch == 0):  # the last batch of an epoch may be short
            self._device_batch = None  # said once
            log.warning('train_loader: a batch has %d samples on this device; global_train_batch_size, on %d devices, '
                        'asks for %d. The run trains on what the loader gives: set its batch size to %d', rows,
                        dist.get_world_size(), asked, asked)

    def eval_end(self, state: State, logger: Logger) -> None:
        if int(state.eval_timestamp.batch) == 0:
            raise UserError('eval_loader: it gave no batch on some rank, so there is nothing to evaluate')

    def epoch_end(self, state: State, logger: Logger) -> None:
        # Not by what `epoch_start` saw: it does not come again for an epoch that a resumed run only finishes.
        assert state.previous_timestamp is not None
        if int(state.previous_timestamp.batch_in_epoch) == 0:
            raise UserError(NO_BATCH)

    def batch_end(self, state: State, logger: Logger) -> None:
        assert state.device_train_microbatch_size is not None
        rows = len(state.batch['input_ids'])
        logger.log_metrics({'trainer/grad_accum': grad_accum(rows, int(state.device_train_microbatch_size)),
                            'trainer/global_step': int(state.timestamp.batch),
                            'trainer/batch_idx': int(state.timestamp.batch_in_epoch)})


class UnigramBaseline(Callback):
    """Logs `baseline/unigram_entropy`, once a start: the entropy in nats of the evaluation set's token frequencies.

    It is the loss of the best model that ignores all context; one that learns anything falls below it. Each sample counts once,
    on any number of ranks. A resumed run computes it again, because its evaluation set may be another.
    """

    def __init__(self):
        self.entropy: Optional[float] = None
        self._counts = torch.zeros(0, dtype=torch.int64)

    def eval_start(self, state: State, logger: Logger) -> None:
        self._counts = torch.zeros(0, dtype=torch.int64)
        sampler = getattr(state.dataloader, 'sampler', None)
        # Where the samples do not divide by the ranks, the sampler repeats some, as the last of those ranks.
        self._rows_left = (len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # pyright: ignore
                           if isinstance(sampler, DistributedSampler) else sys.maxsize)

    def eval_after_forward(self, state: State, logger: Logger) -> None:
        if self.entropy is None:
            _, targets = next_token_targets(state.batch)
            self._rows_left, targets = self._rows_left - len(targets), targets[:self._rows_left]
            counts = torch.bincount(targets[targets != IGNORE].cpu(), minlength=len(self._counts))
            counts[:len(self._counts)] += self._counts
            self._counts = counts

    def eval_end(self, state: State, logger: Logger) -> None:
        if self.entropy is None:
            gathered = dist.all_gather_object(self._counts.tolist())
            longest = max(map(len, gathered))
            total = torch.tensor([c + [0] * (longest - len(c)) for c in gathered]).sum(0)
            p = total[total > 0].double() / total.sum()
            self.entropy = -(p * p.log()).sum().item()
            logger.log_metrics({'baseline/unigram_entropy': self.entropy})


def gradient_copies(model: torch.nn.Module) -> int:
    """How many ranks hold each gradient: all under DDP, one under FSDP, the replicate degree under HSDP."""
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel) and module.sharding_strategy != ShardingStrategy.NO_SHARD:
            group: Any = module.process_group  # the one that shards: a node's ranks under HSDP
            return dist.get_world_size() // group.size()
    for p in model.parameters():
        if isinstance(p, DTensor):
            mesh = p.device_mesh
            replicas = math.prod(mesh.size(i) for i, placement in enumerate(p.placements) if isinstance(placement, Replicate))
            return dist.get_world_size() // mesh.size() * replicas
    return dist.get_world_size()


class NonFiniteGuard(Algorithm):
    """Skips the update of a batch whose loss or gradient is nan or infinite, on all ranks alike.

    The batch counts and the schedule advances; weights, momentum and clipping see nothing of it. Logs
    `trainer/skipped_batches` when it changes and, before clipping, `trainer/grad_norm`.

    Ends a run whose optimizer computes no loss: Composer would go on, and save untrained weights.

    The last of the algorithms: Composer runs them backwards at `AFTER_TRAIN_BATCH`, and clipping by an infinite norm would
    turn the gradients into zeros and nans. Under amp_fp16 only the loss counts: there gradients overflow as a matter of
    course, and the scaler skips them.

    Args:
        max_in_a_row: After so many skipped batches in a row the run ends with a `UserError`.
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
            assert state.algorithms[-1] is self, f'NonFiniteGuard is the last algorithm, not before {state.algorithms[-1]}'
            self._copies = gradient_copies(state.model)
            logger.log_metrics({'trainer/skipped_batches': self.total})
        elif event in (Event.BATCH_START, Event.BEFORE_TRAIN_BATCH):  # the second again, where a microbatch did not fit
            self._losses: list[torch.Tensor] = []
        elif event == Event.AFTER_LOSS:
            self._losses.append(torch.stack([loss.detach().float().mean() for loss in ensure_tuple(state.loss)]).sum())
        elif event == Event.AFTER_TRAIN_BATCH:
            self._judge(state, logger)
        elif not self._losses:
            raise UserError(f'optimizer: step of {type(state.optimizers[0]).__name__} did not call its closure, which '
                            'computes forward and backward passes; call it first: '
                            'loss = torch.enable_grad()(closure)() if closure else None')

    def _judge(self, state: State, logger: Logger) -> None:
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
        what = f'batch {int(state.timestamp.batch) + 1}: loss {loss:.4g}, gradient norm {norm:.4g}'
        log.warning('%s: update skipped (%d in a row, at most %d)', what, self.in_a_row, self.max_in_a_row)
        if self.in_a_row >= self.max_in_a_row:
            raise UserError(f'{what}; {self.in_a_row} batches in a row had a loss or gradient that is not finite: lower '
                            'optimizer.lr, lengthen scheduler.t_warmup, use precision=amp_bf16 or fp32, or look into the data')

    def _loss_and_norm(self, state: State) -> tuple[float, float]:
        """The mean loss of all microbatches and the gradient norm of the model; not finite if they are so on any rank."""
        grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
                 for p in state.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads).float()
        losses = torch.stack(self._losses)
        sums = torch.stack([norm.to(losses.device) ** 2 / self._copies, losses.sum(), torch.ones_like(losses).sum()])
        dist.all_reduce(sums)
        squares, loss, n_microbatches = sums.tolist()
        return loss / n_microbatches, math.sqrt(squares)


class GracefulStop(Callback):
    """Carries out a requested stop: saves after the batch at hand and raises `Stopped`.

    A stop interrupts an evaluation, or skips it. The last of the callbacks, so that all others have seen the batch.

    Args:
        stop: Which signals set, at another moment on every rank.
        save: Saves a checkpoint; called on all ranks, after a batch that this process has trained on. It may be called for
            a batch that is saved already, and while the model is in evaluation mode.
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
        if self._save is not None and self._trained_from is not None and batch > self._trained_from:
            self._save(state, logger)
        raise Stopped(f'stopped on request after batch {batch}')

    def fit_start(self, state: State, logger: Logger) -> None:
        self._trained_from = int(state.timestamp.batch)
        if self._agree(state):
            self._end(state, logger)

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

"""Callbacks that log metrics which Composer does not have, and check the batches of the loaders."""

import logging
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any, Optional

import torch
from composer import callbacks
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch.utils.data import DistributedSampler
from tqdm import tqdm

from src.causal_lm import IGNORE_INDEX, next_token_targets
from src.common.errors import UserError
from src.common.flops import peak_flops
from src.common.progress import progress
from src.config.derived import grad_accum

log = logging.getLogger('src')

NO_FULL_BATCH = ('train_loader: an epoch holds less than one full batch for each device and worker; use more data, a '
                 'smaller global_train_batch_size, fewer train_loader.num_workers, or train_loader.drop_last=false. A '
                 'loader of your own must start again each time it is iterated over; a generator cannot')


class StepCounters(Callback):
    """Logs counters of batches, and checks the batches that the loaders give.

    Logs `trainer/grad_accum` (microbatches per step), `trainer/global_step` (in the run) and `trainer/batch_idx` (in
    the epoch) with every batch, and `trainer/devices` at the start. Shows a progress bar while a resumed run reads the
    batches before its checkpoint. Warns of a training batch that has not `device_batch` samples, which is the number
    that the config sets for this device (None: any number). Raises UserError if an epoch has no batch: Composer
    would start one epoch after the other, without end.
    """

    _reading: Optional[tqdm] = None

    def __init__(self, device_batch: Optional[int] = None) -> None:
        self._device_batch = device_batch

    def fit_start(self, state: State, logger: Logger) -> None:
        logger.log_metrics({'trainer/devices': dist.get_world_size()})
        if behind := int(state.timestamp.batch_in_epoch):
            self._reading = progress('reading up to the checkpoint', behind + 1, ' batches', delay=2)

    def before_dataloader(self, state: State, logger: Logger) -> None:  # comes for batches that are skipped, too
        if self._reading is not None:
            self._reading.update()

    def batch_start(self, state: State, logger: Logger) -> None:
        if self._reading is not None:
            self._reading.close()
            self._reading = None
        if self._device_batch is None:
            return
        rows, expected = len(state.batch['input_ids']), self._device_batch
        if rows > expected or (rows < expected and state.timestamp.batch_in_epoch == 0):  # an epoch may end with fewer
            self._device_batch = None  # warn once
            log.warning('train_loader: a batch has %d samples on this device; global_train_batch_size, on %d devices, '
                        'asks for %d. The run trains on the batches of the loader: set its batch size to %d', rows,
                        dist.get_world_size(), expected, expected)

    def batch_end(self, state: State, logger: Logger) -> None:
        assert state.device_train_microbatch_size is not None
        rows = len(state.batch['input_ids'])
        logger.log_metrics({'trainer/grad_accum': grad_accum(rows, int(state.device_train_microbatch_size)),
                            'trainer/global_step': int(state.timestamp.batch),
                            'trainer/batch_idx': int(state.timestamp.batch_in_epoch)})

    def eval_end(self, state: State, logger: Logger) -> None:
        if int(state.eval_timestamp.batch) == 0:
            raise UserError('eval_loader: a rank got no batch; give each rank at least one batch, or use fewer devices')

    def epoch_end(self, state: State, logger: Logger) -> None:
        # The timestamp tells, not a flag set in `epoch_start`: a resumed run may end an epoch without that event.
        assert state.previous_timestamp is not None
        if int(state.previous_timestamp.batch_in_epoch) == 0:
            raise UserError(NO_FULL_BATCH)


class UnigramBaseline(Callback):
    """Logs `baseline/unigram_entropy` once per start: the entropy, in nats, of the evaluation set's token frequencies.

    The entropy is the loss of the best model that ignores all context; a model that has learned from context has a
    lower loss. Each sample counts once, on any number of ranks. A resumed run computes the entropy again, because its
    evaluation set may be a different one.
    """

    def __init__(self):
        self.entropy: Optional[float] = None
        self._counts: Counter[int] = Counter()

    def eval_start(self, state: State, logger: Logger) -> None:
        self._counts.clear()
        sampler: Any = getattr(state.dataloader, 'sampler', None)
        self._rows_left = sys.maxsize
        if isinstance(sampler, DistributedSampler):  # repeats samples at the end of some ranks, to fill them up
            self._rows_left = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # pyright: ignore

    def eval_after_forward(self, state: State, logger: Logger) -> None:
        if self.entropy is None:
            _, targets = next_token_targets(state.batch)
            self._rows_left, targets = self._rows_left - len(targets), targets[:self._rows_left]
            self._counts.update(targets[targets != IGNORE_INDEX].tolist())

    def eval_end(self, state: State, logger: Logger) -> None:
        if self.entropy is None:
            total = sum(dist.all_gather_object(self._counts), Counter())
            p = torch.tensor([total[token] for token in sorted(total)], dtype=torch.float64) / total.total()
            self.entropy = -(p * p.log()).sum().item()
            logger.log_metrics({'baseline/unigram_entropy': self.entropy})


class SpeedMonitor(callbacks.SpeedMonitor):
    """Composer's SpeedMonitor with the peaks in src/common/flops.py: no MFU for a GPU that is not listed there.

    The FLOPs of a batch are those of this rank, times the samples of all ranks: Composer would add them up over the
    ranks, and read the sum from the GPU.
    """

    def init(self, state: State, logger: Logger) -> None:
        if self.gpu_flops_available is None and torch.cuda.is_available():
            self.gpu_flops_available = peak_flops(torch.cuda.get_device_name(), str(state.precision.value)) or 0
        super().init(state, logger)

    def batch_end(self, state: State, logger: Logger) -> None:
        model: Any = getattr(state.model, 'module', state.model)  # DDP has the model as its `module`
        if hasattr(model, 'flops_per_batch'):
            assert state.previous_timestamp is not None
            samples = int(state.timestamp.sample - state.previous_timestamp.sample)
            self.history_flops.append(model.flops_per_batch(state.batch) * samples / len(state.batch['input_ids']))
        hidden: Any = SimpleNamespace(timestamp=state.timestamp, model=SimpleNamespace(module=None))  # has no FLOPs
        super().batch_end(hidden, logger)

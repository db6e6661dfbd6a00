"""Figures that a run logs beside those of Composer."""

import logging
import sys
from collections import Counter
from typing import Any, Optional

import torch
from composer import callbacks
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch.utils.data import DistributedSampler
from tqdm import tqdm

from src.causal_lm import IGNORE, next_token_targets
from src.common.errors import UserError
from src.common.flops import peak_flops
from src.common.progress import progress
from src.config.derived import grad_accum

log = logging.getLogger('src')

NO_BATCH = ('train_loader: an epoch holds not one full batch for each device and worker; use more data, a smaller '
            'global_train_batch_size, fewer train_loader.num_workers, or train_loader.drop_last=false. A loader of '
            'your own must begin anew each time that it is iterated, which a generator does not')


class StepCounters(Callback):
    """Counts the batches, and looks at what the loaders give.

    Logs `trainer/grad_accum` (microbatches per step), `trainer/global_step` (of the run) and `trainer/batch_idx` (of
    the epoch) with every batch, and `trainer/devices` at a start. Shows how a resumed run reads up to where it was,
    which Composer does in silence. Warns of a batch of training that has another size than the `device_batch` samples
    that the config asks of this device (None: any size does). Ends a run whose epochs hold no batch: Composer would
    begin epoch after epoch, for ever.
    """

    _reading: Optional[tqdm] = None

    def __init__(self, device_batch: Optional[int] = None) -> None:
        self._device_batch = device_batch

    def fit_start(self, state: State, logger: Logger) -> None:
        logger.log_metrics({'trainer/devices': dist.get_world_size()})
        if behind := int(state.timestamp.batch_in_epoch):
            self._reading = progress('reading up to the checkpoint', behind + 1, ' batches', delay=2)

    def before_dataloader(self, state: State, logger: Logger) -> None:  # also for batches that are dropped
        if self._reading is not None:
            self._reading.update()

    def batch_start(self, state: State, logger: Logger) -> None:
        if self._reading is not None:
            self._reading.close()
            self._reading = None
        if self._device_batch is None:
            return
        rows, asked = len(state.batch['input_ids']), self._device_batch
        if rows > asked or (rows < asked and state.timestamp.batch_in_epoch == 0):  # an epoch's last one may be short
            self._device_batch = None  # said once
            log.warning('train_loader: a batch has %d samples on this device; global_train_batch_size, on %d devices, '
                        'asks for %d. The run trains on what the loader gives: set its batch size to %d', rows,
                        dist.get_world_size(), asked, asked)

    def batch_end(self, state: State, logger: Logger) -> None:
        assert state.device_train_microbatch_size is not None
        rows = len(state.batch['input_ids'])
        logger.log_metrics({'trainer/grad_accum': grad_accum(rows, int(state.device_train_microbatch_size)),
                            'trainer/global_step': int(state.timestamp.batch),
                            'trainer/batch_idx': int(state.timestamp.batch_in_epoch)})

    def eval_end(self, state: State, logger: Logger) -> None:
        if int(state.eval_timestamp.batch) == 0:
            raise UserError('eval_loader: it gave no batch on some rank, so there is nothing to evaluate')

    def epoch_end(self, state: State, logger: Logger) -> None:
        # Not by what `epoch_start` saw: it does not come again for an epoch that a resumed run only finishes.
        assert state.previous_timestamp is not None
        if int(state.previous_timestamp.batch_in_epoch) == 0:
            raise UserError(NO_BATCH)


class UnigramBaseline(Callback):
    """Logs `baseline/unigram_entropy`, once a start: the entropy in nats of the evaluation set's token frequencies.

    It is the loss of the best model that ignores all context; one that learns anything falls below it. Each sample
    counts once, on any number of ranks. A resumed run computes it again, as its evaluation set may be another.
    """

    def __init__(self):
        self.entropy: Optional[float] = None
        self._counts: Counter[int] = Counter()

    def eval_start(self, state: State, logger: Logger) -> None:
        self._counts.clear()
        sampler: Any = getattr(state.dataloader, 'sampler', None)
        self._rows_left = sys.maxsize
        if isinstance(sampler, DistributedSampler):  # it repeats some, as the last of a rank, where they do not divide
            self._rows_left = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # pyright: ignore

    def eval_after_forward(self, state: State, logger: Logger) -> None:
        if self.entropy is None:
            _, targets = next_token_targets(state.batch)
            self._rows_left, targets = self._rows_left - len(targets), targets[:self._rows_left]
            self._counts.update(targets[targets != IGNORE].tolist())

    def eval_end(self, state: State, logger: Logger) -> None:
        if self.entropy is None:
            total = sum(dist.all_gather_object(self._counts), Counter())
            p = torch.tensor([total[token] for token in sorted(total)], dtype=torch.float64) / total.total()
            self.entropy = -(p * p.log()).sum().item()
            logger.log_metrics({'baseline/unigram_entropy': self.entropy})


class SpeedMonitor(callbacks.SpeedMonitor):
    """Composer's, whose MFU is of the kit's own table of GPUs: one that it lacks, or a part of one, has none."""

    def init(self, state: State, logger: Logger) -> None:
        if self.gpu_flops_available is None and torch.cuda.is_available():
            self.gpu_flops_available = peak_flops(torch.cuda.get_device_name(), str(state.precision.value)) or 0
        super().init(state, logger)

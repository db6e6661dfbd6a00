"""Figures that a run logs beside those of Composer."""

import logging
import sys
from typing import Optional

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


class SpeedMonitor(callbacks.SpeedMonitor):
    """Composer's, whose MFU is of the kit's own table of GPUs: a GPU that it does not name, or a part of one, has none."""

    def init(self, state: State, logger: Logger) -> None:
        if self.gpu_flops_available is None and torch.cuda.is_available():
            self.gpu_flops_available = peak_flops(torch.cuda.get_device_name(), str(state.precision.value)) or 0
        super().init(state, logger)

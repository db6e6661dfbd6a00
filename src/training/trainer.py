"""Composer's Trainer, with steps that do not wait for the GPU and that make few collectives."""

import itertools
import math
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, Union

import composer
import torch
from composer.core import Event, TrainerMode
from composer.utils import dist
from torch import Tensor

from src.callbacks.loggers import LateLogs
from src.common.errors import UserError
from src.ranks.rendezvous import connect_hosts
from src.training.data import gives_equal_batches

END: Any = object()  # in place of a batch, when a loader has no more


class _UnreadLoss(Tensor):
    """A loss that stays on the device: Composer asks for its number in every step, and makes no use of it."""

    def item(self) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.as_subclass(Tensor)


class Trainer(composer.Trainer):
    """Composer's Trainer, but nothing in a step waits for the GPU. The algorithms must contain NonFiniteGuard.

    Composer reads six numbers of each step from the GPU: whether a rank has no more batches, the loss twice, the
    number of targets, of samples and of tokens. It adds them up over the ranks one by one. Here NonFiniteGuard adds up
    the losses on the GPU, together with its own numbers. The loggers get them as tensors. The ranks add up the numbers
    of samples and targets on the host, or not at all if all ranks have the same.

    A batch is timed on each rank; Composer would send rank 0's time to all.

    The methods below replace those of Composer 0.32.1 with the same names. Read both when you change the version of
    Composer. While a checkpoint is uploaded to an object store, a step makes one more all-reduce, and waits for it.

    Takes the arguments of composer.Trainer, as keywords.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._counts = [0.0, 0.0, 0.0]  # of a batch, on all ranks: samples, targets, and what weighs microbatches
        self._has_equal_ranks = dist.get_world_size() == 1 or gives_equal_batches(self.state.train_dataloader)
        self._host_group: Any = None  # the default group, if that is gloo
        if not self._has_equal_ranks and torch.distributed.get_backend() != 'gloo':
            self._host_group = connect_hosts(kwargs.get('dist_timeout', 300))
        shown = kwargs.get('log_to_console') and kwargs.get('console_log_interval')
        self._late_logs = LateLogs(shown or '100ba')
        self.state.callbacks.append(self._late_logs)

    def fit(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().fit(*args, **kwargs)
        finally:
            self._late_logs.release()

    def _iter_dataloader(self, trainer_mode: TrainerMode) -> Iterator[Any]:
        """The batches of an epoch, in the form that the model needs, until a rank has no more."""
        if trainer_mode != TrainerMode.TRAIN:
            yield from super()._iter_dataloader(trainer_mode)
            return
        assert self.state.dataloader is not None and self._train_data_spec is not None
        length = self.state.dataloader_len
        batches = itertools.islice(self.state.dataloader, None if length is None else int(length))
        while True:
            self.engine.run_event(Event.BEFORE_DATALOADER)
            batch = next(batches, END)
            if batch is END:
                self.engine.run_marker_only_event(Event.AFTER_DATALOADER)
            else:
                batch = self._train_data_spec.batch_transforms(batch)
            if not self._count_over_ranks(batch):
                return
            yield batch

    def _count_over_ranks(self, batch: Any) -> bool:
        """Sets `_counts` for this batch; returns false if it is END, on this rank or on another."""
        spec: Any = self._train_data_spec
        own = [float(batch is END), 0.0, 0.0, 0.0]
        if batch is not END:
            self._own_weight = self._weigh(batch)
            own[1:] = spec.get_num_samples_in_batch(batch), spec.get_num_tokens_in_batch(batch), self._own_weight
        if self._has_equal_ranks:
            n_ended, *self._counts = [number * dist.get_world_size() for number in own]
        else:
            sums = torch.tensor(own, dtype=torch.float64)
            dist.all_reduce(sums, group=self._host_group)
            n_ended, *self._counts = sums.tolist()
        return n_ended == 0

    def _weigh(self, batch: Any) -> float:
        """What a batch weighs in the mean over all ranks: its targets, or its samples."""
        spec: Any = self._train_data_spec
        return float(spec.get_num_tokens_in_batch(batch, token_type='loss_generating')
                     if self.accumulate_train_batch_on_tokens else spec.get_num_samples_in_batch(batch))

    def _accumulate_time_across_ranks(self, num_samples: Union[int, float], num_tokens: int,
                                      batch_time: timedelta) -> tuple[int, int, timedelta]:
        if self.state.dataloader is not self.state.train_dataloader:  # in an evaluation
            return super()._accumulate_time_across_ranks(num_samples, num_tokens, batch_time)
        return int(self._counts[0]), int(self._counts[1]), batch_time

    def _train_batch(self, use_grad_scaling: bool) -> Any:
        super()._train_batch(use_grad_scaling)
        self.logger.log_metrics(self.state.total_loss_dict)
        return None  # which Composer allows; with the losses, it would add them up once more, and read them

    def _train_microbatches(self, microbatches: Sequence[Any], total_loss_dict: dict[str, Tensor],
                            ddp_sync: bool = True) -> Tensor:
        """Computes the gradients of a batch, and returns its loss on this rank."""
        state, spec = self.state, self._train_data_spec
        assert spec is not None and state.scaler is not None
        state.total_loss_dict = total_loss_dict  # pyright: ignore[reportAttributeAccessIssue]
        if not ddp_sync:  # for optimizers that call their closure several times
            return super()._train_microbatches(microbatches, total_loss_dict, ddp_sync)
        self.engine.run_event(Event.BEFORE_TRAIN_BATCH)
        for optimizer in state.optimizers:
            optimizer.zero_grad()
        use_grad_scaling = self._use_grad_scaling(state.precision, state.scaler)
        whole_batch, weight = state.batch, self._counts[2] / dist.get_world_size()
        own_weight = sum(map(self._weigh, microbatches))
        if dist.get_world_size() == 1:
            weight = own_weight
        elif not math.isclose(own_weight, self._own_weight):
            raise UserError('train_loader: an algorithm or callback has changed which targets of a batch count, after '
                            'the ranks had counted them; change the batch in the loader')
        for number, batch in enumerate(microbatches, 1):
            state.batch = spec.microbatch_transforms(state.device.batch_to_device(batch))
            losses = self._train_microbatch(use_grad_scaling, weight, number == len(microbatches))
            for name, loss in losses.items():
                key = f'loss/train/{name}'
                total_loss_dict[key] = total_loss_dict.get(key, 0) + loss
        state.batch = whole_batch
        for optimizer in state.optimizers if use_grad_scaling else ():
            state.scaler.unscale_(optimizer)
        self.engine.run_event(Event.AFTER_TRAIN_BATCH)
        return total_loss_dict['loss/train/total'].as_subclass(_UnreadLoss)

"""Wraps a loader of your own, any DataLoader or iterable of batches, so that epochs and resumed runs have one order."""

import inspect
from collections.abc import Iterator
from typing import Any, Optional

import torch
from streaming.base.distributed import get_world_size
from torch.utils import data
from torch.utils.data import DataLoader, IterableDataset

RANDOM_SAMPLERS = (data.RandomSampler, data.SubsetRandomSampler, data.WeightedRandomSampler)


class OrderedBatches:
    """The batches of a loader of your own, in an order that depends only on the number of the epoch.

    To come to its epoch, a resumed run starts each earlier epoch and reads one batch of it. That draws fewer random
    numbers than whole epochs do, so each epoch gets its own seed. Every evaluation has the order of epoch 0. The
    wrapper hides the DataLoader from Composer, which would call the dataset's `state_dict` with streaming's arguments.
    """

    def __init__(self, loader: Any, evaluate: bool = False, length: int = 0) -> None:
        self.loader, self._evaluate, self._length, self._epoch = loader, evaluate, length, 0
        batches = getattr(loader, 'batch_sampler', None)
        samplers: list[Any] = [getattr(loader, 'sampler', None), batches, getattr(batches, 'sampler', None)]
        for sampler in samplers:
            if isinstance(sampler, RANDOM_SAMPLERS) and sampler.generator is None:
                sampler.generator = getattr(loader, 'generator', None)
        generators = {part.generator for part in (loader, *samplers)
                      if isinstance(getattr(part, 'generator', None), torch.Generator)}
        self._seeds = [(generator, generator.initial_seed()) for generator in generators]
        parts: dict[int, Any] = {id(part): part for part in (loader, getattr(loader, 'dataset', None), *samplers)}
        self._with_set_epoch = [part for part in parts.values() if hasattr(part, 'set_epoch')]

    def __iter__(self) -> Iterator[Any]:
        for generator, seed in self._seeds:
            generator.manual_seed(seed + self._epoch * get_world_size())
        for part in self._with_set_epoch:
            part.set_epoch(self._epoch)
        self._epoch += not self._evaluate
        return iter(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == 'loader' or name.startswith('__'):  # a copy that has no attributes yet, or a name of Python's own
            raise AttributeError(name)
        return getattr(self.loader, name)  # callbacks read `dataset`, `batch_size` and others


class SizedBatches(OrderedBatches):
    """Batches with a length: the batches in an epoch; in training, those of the rank that has the fewest.

    A class of its own, because Composer refuses an evaluation whose `len` raises TypeError.
    """

    def __len__(self) -> int:
        return self._length


def can_save_place(loader: Any) -> bool:
    """Whether the loader's dataset can save its place in an epoch in the form that Composer calls (streaming's)."""
    if not (isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset)):
        return False
    try:
        state_dict: Any = loader.dataset.state_dict  # pyright: ignore
        inspect.signature(state_dict).bind(num_samples=0, from_beginning=True)
    except (AttributeError, TypeError):
        return False
    return True


def find_sampler(loader: DataLoader) -> Any:
    """The sampler that chooses the samples: the loader's own, or the one inside its batch sampler."""
    order = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    return order.sampler if type(order) is data.BatchSampler else order


def count_batches(loader: Any) -> Optional[int]:
    """Number of batches in an epoch; None where the loader does not know it."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def unwrap_loader(loader: Any) -> Any:
    """The original loader, without the wrapper OrderedBatches."""
    return loader.loader if isinstance(loader, OrderedBatches) else loader


def describe_loader(loader: Any) -> str:
    """The class of a loader and of its dataset, for messages."""
    loader = unwrap_loader(loader)
    dataset = f' of {type(loader.dataset).__name__}' if isinstance(loader, DataLoader) else ''
    return f'{type(loader).__name__}{dataset}'

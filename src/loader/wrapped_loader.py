"""A loader of the user's own, which may be any DataLoader or iterable of batches; src/training/data.py imports it."""

import inspect
from collections.abc import Iterator
from typing import Any, Optional

import torch
from streaming.base.distributed import get_world_size
from torch.utils import data
from torch.utils.data import DataLoader, IterableDataset

SHUFFLE = (data.RandomSampler, data.SubsetRandomSampler, data.WeightedRandomSampler)  # PyTorch's


class Batches:
    """The batches of a loader of the user's own, in an order that depends on the number of the epoch alone.

    A resumed run begins each epoch that is over, reads a batch of it, and so comes to its own epoch; PyTorch's samplers
    draw more random numbers in a whole epoch. Every evaluation has the order of epoch 0. Composer sees no more than the
    batches: it would call `state_dict` of any dataset in a form that other libraries do not have.
    """

    def __init__(self, loader: Any, evaluate: bool = False, length: int = 0) -> None:
        self.loader, self._evaluate, self._length, self._epoch = loader, evaluate, length, 0
        batches = getattr(loader, 'batch_sampler', None)
        samplers: list[Any] = [getattr(loader, 'sampler', None), batches, getattr(batches, 'sampler', None)]
        for sampler in samplers:
            if isinstance(sampler, SHUFFLE) and sampler.generator is None:
                sampler.generator = getattr(loader, 'generator', None)
        generators = {part.generator for part in (loader, *samplers)
                      if isinstance(getattr(part, 'generator', None), torch.Generator)}
        self._seeds = [(generator, generator.initial_seed()) for generator in generators]
        parts: dict[int, Any] = {id(part): part for part in (loader, getattr(loader, 'dataset', None), *samplers)}
        self._told = [part for part in parts.values() if hasattr(part, 'set_epoch')]

    def __iter__(self) -> Iterator[Any]:
        for generator, seed in self._seeds:
            generator.manual_seed(seed + self._epoch * get_world_size())
        for part in self._told:
            part.set_epoch(self._epoch)
        self._epoch += not self._evaluate
        return iter(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == 'loader' or name.startswith('__'):  # of a copy that is not filled yet, or Python's own
            raise AttributeError(name)
        return getattr(self.loader, name)  # callbacks ask for `dataset`, `batch_size` and others


class SizedBatches(Batches):
    """Batches that are counted: `length` in an epoch; in training, of the rank that has the fewest.

    Composer refuses an evaluation whose `len` raises TypeError, as a DataLoader's may.
    """

    def __len__(self) -> int:
        return self._length


def has_state(loader: Any) -> bool:
    """Whether Composer can save the place in a loader's dataset, as in streaming's."""
    if not (isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset)):
        return False
    try:
        state_dict: Any = loader.dataset.state_dict  # pyright: ignore
        inspect.signature(state_dict).bind(num_samples=0, from_beginning=True)
    except (AttributeError, TypeError):
        return False
    return True


def sampler_of(loader: DataLoader) -> Any:
    """What gives the numbers of the samples, in PyTorch's own batches or in others."""
    order = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    return order.sampler if type(order) is data.BatchSampler else order


def epoch_length(loader: Any) -> Optional[int]:
    """Batches in an epoch; None: nobody knows."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def unwrap_loader(loader: Any) -> Any:
    """The user's own loader, without Batches around it."""
    return loader.loader if isinstance(loader, Batches) else loader


def describe_loader(loader: Any) -> str:
    """The class of a loader and of its dataset, for messages."""
    loader = unwrap_loader(loader)
    of = f' of {type(loader.dataset).__name__}' if isinstance(loader, DataLoader) else ''
    return f'{type(loader).__name__}{of}'

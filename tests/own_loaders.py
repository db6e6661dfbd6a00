"""Loaders that a user might write, by name, for tests in one process and for `tests/runs.py` in several."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from composer.utils.dist import get_global_rank, get_sampler
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate

ROWS, SEQ, VOCAB = 31, 32, 512


class Rows(Dataset):
    """Rows of token ids whose first id is the number of the row; `change` edits the dict of each row."""

    def __init__(self, change: Callable[[dict[str, Any]], Any] = lambda row: row):
        self.change = change

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, i: int) -> Any:
        ids = torch.randint(0, VOCAB, (SEQ,), generator=torch.Generator().manual_seed(i))
        ids[0] = i
        return self.change({'input_ids': ids, 'labels': ids.clone()})


class Stream(IterableDataset):
    """The same rows without a length. `state_dict` takes no arguments, as in other libraries."""

    def __iter__(self) -> Iterator[Any]:
        return (Rows()[i] for i in range(ROWS))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError


class Stateful(Rows):
    """Rows with a state in the form of other libraries."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError


class Told(IterableDataset):
    """Starts each epoch at another row, chosen by `set_epoch`, and reads every row."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        return (Rows()[(i + 7 * self.epoch) % ROWS] for i in range(ROWS))


class Forward(Sampler):
    """The rows in order, from a generator that is not PyTorch's."""

    def __init__(self):
        self.random, self.epochs = np.random.default_rng(0), []

    @property
    def generator(self) -> Any:
        return self.random

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(range(ROWS))

    def __len__(self) -> int:
        return ROWS


class Anew:
    """An iterable of batches that starts anew each time and has no length."""

    def __init__(self, batches: list[Any]):
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def narrow(row: dict[str, Any]) -> dict[str, Any]:
    return {'input_ids': row['input_ids'].to(torch.int32), 'labels': row['labels'].to(torch.int16),
            'attention_mask': torch.ones(SEQ, dtype=torch.bool)}


def with_other_keys(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Batches with values for each sample and values for the whole batch."""
    return {**default_collate(samples), 'url': ['http'] * len(samples), 'weight': torch.ones(len(samples)), 'epoch': 3,
            'nothing': None, 'scale': torch.tensor(2.0), 'array': np.arange(len(samples)),
            'place': {'at': torch.ones(2)}}


# Each of these loaders gives the same batches of 12, 12 and 7 rows
FORMS: dict[str, Callable[[], Any]] = {
    'plain': lambda: DataLoader(Rows(), 12),
    'without labels': lambda: DataLoader(Rows(lambda row: {'input_ids': row['input_ids']}), 12),
    'narrow types': lambda: DataLoader(Rows(narrow), 12),
    'other keys': lambda: DataLoader(Rows(), 12, collate_fn=with_other_keys),
    'no length': lambda: DataLoader(Stream(), 12),
    'a list': lambda: [*DataLoader(Rows(), 12)],
    'any iterable': lambda: Anew([*DataLoader(Rows(), 12)]),
    'arrays': lambda: Anew([{'input_ids': batch['input_ids'].numpy(), 'labels': batch['labels'].numpy().astype('>u2')}
                            for batch in DataLoader(Rows(), 12)]),
    'own state': lambda: DataLoader(Stateful(), 12, sampler=get_sampler(Stateful(), shuffle=False)),
    'own n_targets': lambda: [{**batch, 'n_targets': 3} for batch in DataLoader(Rows(narrow), 12)],
}


def sampled(cfg: Any, batch_size: int, evaluate: bool = False) -> DataLoader:
    """A sampler that shuffles for training, and reads each row once for an evaluation."""
    sampler = get_sampler(Rows(), shuffle=not evaluate, drop_last=not evaluate)
    return DataLoader(Rows(), batch_size, sampler=sampler, drop_last=not evaluate)


def shuffled(cfg: Any, batch_size: int, evaluate: bool = False) -> DataLoader:
    """An order that depends on PyTorch's random state alone."""
    return DataLoader(Rows(), batch_size, shuffle=not evaluate)


def told(cfg: Any, batch_size: int, evaluate: bool = False) -> DataLoader:
    """An order that depends on the number of the epoch."""
    return DataLoader(Told(), batch_size)


def uneven(cfg: Any, batch_size: int, evaluate: bool = False) -> list[Any]:
    """Four batches on rank 0, two on the others."""
    return [*DataLoader(Rows(), 6)][:2 if get_global_rank() else 4]


BUILDERS: dict[str, Callable[..., Any]] = {'sampled': sampled, 'shuffled': shuffled, 'uneven': uneven}

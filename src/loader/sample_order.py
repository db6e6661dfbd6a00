"""Which samples are read, in which order: the same on any number of nodes, devices and loader workers."""

from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray
from streaming.base.batching.stratified import generate_work_stratified_batching
from streaming.base.world import World
from torch.utils.data import Dataset

from src.common.errors import UserError


def deal_whole_batches(num_samples: int, num_canonical_nodes: int, num_physical_nodes: int, ranks_per_node: int,
                       workers_per_rank: int, batch_size: int, drop_first: int = 0,
                       initial_physical_nodes: Optional[int] = None) -> NDArray[np.int64]:
    """The samples of an epoch from `drop_first` on, dealt to devices and workers: streaming's order, each sample once.

    What fills no global batch is left out. Streaming's own partition algorithms repeat samples until each canonical
    node, rank and worker has as many, so that what they yield depends on the devices, and refuse numbers of nodes that
    are neither a factor nor a multiple of the canonical ones. Where they repeat nothing, they deal as this does.

    Returns places in the epoch's order, (nodes, ranks per node, workers per rank, batches, batch_size); -1: none.
    """
    bounds = np.arange(num_canonical_nodes + 1) * num_samples // num_canonical_nodes
    turns = num_samples // num_canonical_nodes  # the canonical nodes take turns, a sample each; then some have one more
    order = (bounds[:-1] + np.arange(turns)[:, None]).ravel()
    order = np.concatenate([order, bounds[1:][np.diff(bounds) > turns] - 1])[drop_first:]
    n_batches = len(order) // (batch_size * ranks_per_node * num_physical_nodes)
    order = order[:n_batches * batch_size * ranks_per_node * num_physical_nodes]
    batches = order.reshape(n_batches, batch_size, ranks_per_node, num_physical_nodes).transpose(3, 2, 0, 1)
    batches = np.pad(batches, ((0, 0), (0, 0), (0, -n_batches % workers_per_rank), (0, 0)), constant_values=-1)
    by_worker = batches.reshape(num_physical_nodes, ranks_per_node, -1, workers_per_rank, batch_size)
    return by_worker.transpose(0, 1, 3, 2, 4)


def deal_stratified_batches(dataset: Any, world: World, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
    """Streaming's `stratified`, arranged as for one device and then dealt: every global batch has each stream's share.

    Streaming's own deals each stream to the devices first, and leaves out samples whose number depends on theirs.
    Returns sample ids, of shape (nodes, ranks per node, workers per rank, batches, batch_size); -1: none.
    """
    device_batch_size = dataset.batch_size
    dataset.batch_size = device_batch_size * world.ranks_per_node * world.num_nodes
    try:
        batches = generate_work_stratified_batching(dataset, World(1, 1, 1, 0), epoch, sample_in_epoch)[0, 0, 0]
    finally:
        dataset.batch_size = device_batch_size
    batches = np.pad(batches, ((0, -len(batches) % world.workers_per_rank), (0, 0)), constant_values=-1)
    shape = (-1, world.workers_per_rank, world.num_nodes, world.ranks_per_node, device_batch_size)
    return batches.reshape(shape).transpose(2, 3, 1, 0, 4)


def batches_in_epoch(dataset: Any, global_batch_size: int) -> int:
    """How many whole global batches there are in an epoch of a `CheckedDataset`, on any number of devices.

    `global_batch_size` counts samples over all devices. Raises UserError where a stream is too small for its part of a
    batch.
    """
    if dataset.batching_method == 'random' or len(dataset.streams) == 1:
        return dataset.epoch_size // global_batch_size
    chosen = np.array([stream.choose for stream in dataset.streams])
    exact = global_batch_size * np.array([stream.proportion for stream in dataset.streams])
    part = exact.astype(np.int64)  # of each stream in a batch; the rest goes to those that rounding took most from
    part[np.argsort(exact - part)[::-1][:global_batch_size - part.sum()]] += 1
    if dataset.batching_method == 'per_stream':
        part[:] = global_batch_size
    for stream, samples, n in zip(dataset.streams, chosen, part):
        if not 0 < n <= samples:
            raise UserError(f'{stream.setting}: gives {samples} samples to an epoch and {n} to a batch of '
                            f'global_train_batch_size {global_batch_size}, with batching_method '
                            f'{dataset.batching_method!r}, which needs 1 or more in a batch and a whole batch in an '
                            'epoch. Set a larger weight or another global_train_batch_size, or batching_method random')
    batches = chosen // part
    return int(batches.sum() if dataset.batching_method == 'per_stream' else batches.min())


class EvalView(Dataset):
    """The first samples of a StreamingC4 by index, each of them once; of several streams, the first of each.

    As a StreamingDataset iterates, it repeats samples until every rank has as many. Composer drops those that a
    DistributedSampler repeats, so an evaluation over this view counts every sample once, on any number of ranks.

    The dataset does not pack on the fly. `eval_samples` says how many there are; -1: all. Streams have shares in
    proportion to their sizes.
    """

    def __init__(self, dataset: Any, eval_samples: int = -1) -> None:
        self.dataset = dataset
        n = dataset.size if eval_samples == -1 else min(eval_samples, dataset.size)
        ends = n * dataset.samples_per_stream.cumsum() // dataset.size  # of the streams' shares in the view
        self.indices = np.concatenate([begin + np.arange(share) for begin, share in
                                       zip(dataset.sample_offset_per_stream, np.diff(ends, prepend=0))])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """What a DataLoader calls for a batch."""
        if not all(0 <= i < len(self) for i in indices):
            raise IndexError(f'{indices} are not all in 0 to {len(self) - 1}')
        return self.dataset.samples([self.dataset[self.indices[i]] for i in indices])

"""Decides the order in which samples are read; it is the same on any number of nodes, devices and workers."""

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
    """Distributes the samples of an epoch, from `drop_first` on, over devices and workers, each sample once.

    The samples at the end that do not fill a global batch are left out. Streaming's own partition algorithms repeat
    samples until each canonical node, rank and worker has the same number, so their order depends on the devices, and
    they refuse many numbers of nodes. Where they repeat no sample, this function gives the same result.

    Returns positions in the epoch, (nodes, ranks per node, workers per rank, batches, batch_size); -1: no sample.
    """
    bounds = np.arange(num_canonical_nodes + 1) * num_samples // num_canonical_nodes
    turns = num_samples // num_canonical_nodes  # the canonical nodes give one sample in turn; some have one more left
    order = (bounds[:-1] + np.arange(turns)[:, None]).ravel()
    order = np.concatenate([order, bounds[1:][np.diff(bounds) > turns] - 1])[drop_first:]
    n_batches = len(order) // (batch_size * ranks_per_node * num_physical_nodes)
    order = order[:n_batches * batch_size * ranks_per_node * num_physical_nodes]
    batches = order.reshape(n_batches, batch_size, ranks_per_node, num_physical_nodes).transpose(3, 2, 0, 1)
    batches = np.pad(batches, ((0, 0), (0, 0), (0, -n_batches % workers_per_rank), (0, 0)), constant_values=-1)
    by_worker = batches.reshape(num_physical_nodes, ranks_per_node, -1, workers_per_rank, batch_size)
    return by_worker.transpose(0, 1, 3, 2, 4)


def deal_stratified_batches(dataset: Any, world: World, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
    """Streaming's batching method `stratified`, in one order on any number of devices.

    Every global batch has the same share of each stream. The batches are made as for one device and then distributed.
    Streaming's own method distributes each stream first, and leaves out samples that depend on the number of devices.
    Returns sample ids, of shape (nodes, ranks per node, workers per rank, batches, batch_size); -1: no sample.
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
    """Number of whole global batches in an epoch of a `CheckedDataset`; the same on any number of devices.

    `global_batch_size` is in samples over all devices. Raises UserError if a stream is too small for its share of a
    batch.
    """
    if dataset.batching_method == 'random' or len(dataset.streams) == 1:
        return dataset.epoch_size // global_batch_size
    chosen = np.array([stream.choose for stream in dataset.streams])
    exact = global_batch_size * np.array([stream.proportion for stream in dataset.streams])
    share = exact.astype(np.int64)  # samples of each stream in a batch; the streams that lost most by rounding get more
    share[np.argsort(exact - share)[::-1][:global_batch_size - share.sum()]] += 1
    if dataset.batching_method == 'per_stream':
        share[:] = global_batch_size
    for stream, samples, n in zip(dataset.streams, chosen, share):
        if not 0 < n <= samples:
            raise UserError(f'{stream.setting}: gives {samples} samples to an epoch and {n} to a batch of '
                            f'global_train_batch_size {global_batch_size}, but batching_method '
                            f'{dataset.batching_method!r} needs at least 1 in a batch, and enough in an epoch for one '
                            'batch. Set a larger weight, another global_train_batch_size, or batching_method=random')
    batches = chosen // share
    return int(batches.sum() if dataset.batching_method == 'per_stream' else batches.min())


class EvalView(Dataset):
    """The first samples of a StreamingC4 for an evaluation, each once, by index.

    Iterating a StreamingDataset repeats samples until every rank has the same number. A DistributedSampler over this
    view repeats some too, but Composer drops those, so that every sample counts once on any number of ranks.

    `dataset` does not pack on the fly. `eval_samples` is the number of samples; -1: all. Several streams have shares
    in proportion to their sizes.
    """

    def __init__(self, dataset: Any, eval_samples: int = -1) -> None:
        self.dataset = dataset
        n = dataset.size if eval_samples == -1 else min(eval_samples, dataset.size)
        ends = n * dataset.samples_per_stream.cumsum() // dataset.size  # where the share of each stream ends
        self.indices = np.concatenate([begin + np.arange(share) for begin, share in
                                       zip(dataset.sample_offset_per_stream, np.diff(ends, prepend=0))])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """Samples of a whole batch; a DataLoader calls this where it exists."""
        if not all(0 <= i < len(self) for i in indices):
            raise IndexError(f'{indices} are not all in 0 to {len(self) - 1}')
        return self.dataset.samples([self.dataset[self.indices[i]] for i in indices])

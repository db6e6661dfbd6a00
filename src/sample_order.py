"""The order of samples in an epoch, the same on any number of nodes, devices and loader workers."""

from typing import Optional

import numpy as np
from numpy.typing import NDArray
from streaming.base.partition import algos


def whole_batches(num_samples: int, num_canonical_nodes: int, num_physical_nodes: int, ranks_per_node: int, workers_per_rank: int,
                  batch_size: int, drop_first: int = 0, initial_physical_nodes: Optional[int] = None) -> NDArray[np.int64]:
    """The samples of an epoch from `drop_first` on, dealt to devices and workers: streaming's order, each sample once.

    What fills no global batch is left out. Streaming's own partition algorithms repeat samples until each canonical
    node, rank and worker has as many, so that what they yield depends on the devices, and refuse numbers of nodes
    that are neither a factor nor a multiple of the canonical ones. Where they repeat nothing, they deal as this does.

    Returns:
        Places in the epoch's order, of shape (nodes, ranks per node, workers per rank, batches, batch_size); -1: none.
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


algos[whole_batches.__name__] = whole_batches  # where StreamingDataset looks for its `partition_algo`

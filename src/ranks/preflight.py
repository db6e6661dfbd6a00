"""A trial sum over all ranks, before hours of training depend on it."""

import statistics
import time
from collections import Counter

import torch
from torch import Tensor

from src.common.errors import UserError
from src.common.machine import BOOT_ID, SHARED_MEMORY
from src.ranks.agreement import describe_ranks, explain_network_errors, gather_from_ranks
from src.ranks.environment import Process, rank


def preflight() -> str:
    """Sums a tensor over all ranks, which must all call this.

    Returns lines for the log: the devices of each node and, with several ranks, how fast the sum was. The bus bandwidth
    is bytes / seconds * 2 (n - 1) / n, as nccl-tests define it (https://github.com/NVIDIA/nccl-tests,
    doc/PERFORMANCE.md): comparable with the hardware's, for any number n of ranks. Raises UserError where a sum is
    wrong, and says whose part of it; or where the ranks cannot reach each other, or two nodes share one /dev/shm.
    """
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'
    told = gather_from_ranks((device, _shared_memory()))
    ranks = list(told)
    devices = Counter((process.node, process.host, device) for process, (device, _) in told.items())
    each = ', '.join(f'node {node} {host} {count} x {device}' for (node, host, device), count in devices.items())
    nodes = len({process.node for process in ranks})
    line = f'devices: {len(ranks)} on {nodes} node{"s" * (nodes > 1)}: {each}'
    if len(ranks) == 1:
        return line
    check_shared_memory_apart({process: memory for process, (_, memory) in told.items()})
    check_sum(ranks, rank() + 1)
    return f'{line}\n{_speed(len(ranks))}'


def _shared_memory() -> str:
    """What tells this process's /dev/shm from all others: the kernel's start, and the folder's numbers; '': unknown."""
    try:
        folder = SHARED_MEMORY.stat()
        return f'{BOOT_ID.read_text("utf-8")} {folder.st_dev} {folder.st_ino}'
    except OSError:
        return ''


def check_shared_memory_apart(memories: dict[Process, str]) -> None:
    """Refuses nodes that share one /dev/shm, where streaming takes the ranks of a machine for those of one node."""
    nodes: dict[str, set[int]] = {}
    for process, memory in memories.items():
        nodes.setdefault(memory, set()).add(process.node)
    sharing = [process for process, memory in memories.items() if memory and len(nodes[memory]) > 1]
    if sharing:
        raise UserError(f'{describe_ranks(sharing, memories)} share one {SHARED_MEMORY}, and each node needs its own: '
                        'these nodes are launchers on one machine, or containers with --ipc=host. Start one node with '
                        f'the ranks of all of them (composer -n), or give each container its own {SHARED_MEMORY} '
                        '(docker run --ipc=private --shm-size=16g)')


def check_sum(ranks: list[Process], part: float) -> None:
    """Adds up a column for each rank, filled by it with `part`, which has to be its rank + 1.

    Raises UserError where the sum is wrong, and says whose part of it, and on which ranks.
    """
    n = len(ranks)
    columns = torch.zeros(1024, n, device=_device())
    columns[:, rank()] = part
    _timed_sum(columns)
    is_right = (columns == torch.arange(1, n + 1, device=columns.device)).all(dim=0)
    lost = gather_from_ranks([i for i, right in enumerate(is_right.tolist()) if not right])
    if wrong := sorted({i for some in lost.values() for i in some}):
        where = describe_ranks([process for process, some in lost.items() if some], lost)
        raise UserError(f'all-reduce over {n} ranks is wrong: the part of '
                        f'{describe_ranks([ranks[i] for i in wrong], ranks)} did not arrive as '
                        f'sent, as seen on {where}; leave the node out, and test its devices and network')


def _speed(n: int) -> str:
    mib = 64 if torch.cuda.is_available() else 8
    x = torch.zeros(mib << 18, device=_device())  # zeros stay finite, however often they are summed
    seconds = statistics.median([_timed_sum(x) for _ in range(6)][1:])  # the first one warms up
    speed = (mib << 20) / seconds / 1e9
    return (f'all-reduce: correct; {mib} MiB in {seconds * 1e3:.1f} ms, {speed:.3g} GB/s '
            f'(bus bandwidth {speed * 2 * (n - 1) / n:.3g} GB/s)')


def _device() -> str:
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def _timed_sum(x: Tensor) -> float:
    """Sums a tensor over all ranks, in place; returns the seconds that it took."""
    with explain_network_errors('the sum over all ranks failed'):
        started = time.perf_counter()
        torch.distributed.all_reduce(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

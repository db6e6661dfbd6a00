"""Tests the all-reduce over all ranks before training begins, and measures its speed."""

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
    """Tests the all-reduce and returns lines for the log. Every rank must call this function.

    The lines list the devices of each node and, with several ranks, the speed of the all-reduce. The bus bandwidth is
    bytes / seconds * 2 (n - 1) / n for n ranks, as nccl-tests define it (https://github.com/NVIDIA/nccl-tests,
    doc/PERFORMANCE.md), so that it can be compared with the bandwidth of the hardware. Raises UserError if a sum is
    wrong (the message names the rank), where ranks cannot reach each other, or where two nodes share one /dev/shm.
    """
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'
    answers = gather_from_ranks((device, _shared_memory_id()))
    ranks = list(answers)
    devices = Counter((process.node, process.host, device) for process, (device, _) in answers.items())
    each = ', '.join(f'node {node} {host} {count} x {device}' for (node, host, device), count in devices.items())
    nodes = len({process.node for process in ranks})
    line = f'devices: {len(ranks)} on {nodes} node{"s" * (nodes > 1)}: {each}'
    if len(ranks) == 1:
        return line
    check_shared_memory_apart({process: memory for process, (_, memory) in answers.items()})
    check_sum(ranks, rank() + 1)
    return f'{line}\n{_measure_all_reduce(len(ranks))}'


def _shared_memory_id() -> str:
    """Identifies this process's /dev/shm by the boot of the kernel, the device and the inode; '' if unknown."""
    try:
        folder = SHARED_MEMORY.stat()
        return f'{BOOT_ID.read_text("utf-8")} {folder.st_dev} {folder.st_ino}'
    except OSError:
        return ''


def check_shared_memory_apart(memories: dict[Process, str]) -> None:
    """Raises UserError if nodes share one /dev/shm: streaming would take their ranks for the ranks of one node."""
    nodes: dict[str, set[int]] = {}
    for process, memory in memories.items():
        nodes.setdefault(memory, set()).add(process.node)
    sharing = [process for process, memory in memories.items() if memory and len(nodes[memory]) > 1]
    if sharing:
        raise UserError(f'{describe_ranks(sharing, memories)} share one {SHARED_MEMORY}, and each node needs its own: '
                        'these nodes are launchers on one machine, or containers with --ipc=host. Start one launcher '
                        f'with all ranks (composer -n), or give each container its own {SHARED_MEMORY} (docker run '
                        '--ipc=private --shm-size=16g)')


def check_sum(ranks: list[Process], part: float) -> None:
    """Sums a matrix over all ranks. Rank i fills column i with its `part`, i + 1; all other numbers are 0.

    Raises UserError if the sum is wrong: the message names the ranks whose part is wrong, and those that see it.
    """
    n = len(ranks)
    columns = torch.zeros(1024, n, device=_device())  # (rows, ranks)
    columns[:, rank()] = part
    _timed_sum(columns)
    is_right = (columns == torch.arange(1, n + 1, device=columns.device)).all(dim=0)
    wrong_columns = gather_from_ranks([i for i, right in enumerate(is_right.tolist()) if not right])
    if wrong := sorted({i for some in wrong_columns.values() for i in some}):
        where = describe_ranks([process for process, some in wrong_columns.items() if some], wrong_columns)
        raise UserError(f'all-reduce over {n} ranks is wrong: the part of '
                        f'{describe_ranks([ranks[i] for i in wrong], ranks)} did not arrive as '
                        f'sent, as seen on {where}; run without that node, and test its devices and network')


def _measure_all_reduce(n: int) -> str:
    """Returns a line with the median time of five sums over `n` ranks."""
    mib = 64 if torch.cuda.is_available() else 8
    x = torch.zeros(mib << 18, device=_device())  # zeros stay finite after many sums
    seconds = statistics.median([_timed_sum(x) for _ in range(6)][1:])  # without the first one, a warm-up
    speed = (mib << 20) / seconds / 1e9
    return (f'all-reduce: correct; {mib} MiB in {seconds * 1e3:.1f} ms, {speed:.3g} GB/s '
            f'(bus bandwidth {speed * 2 * (n - 1) / n:.3g} GB/s)')


def _device() -> str:
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def _timed_sum(x: Tensor) -> float:
    """Sums a tensor over all ranks, in place, and returns the seconds that this took."""
    with explain_network_errors('the sum over all ranks failed'):
        started = time.perf_counter()
        torch.distributed.all_reduce(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

"""Several processes on several nodes: what the launcher set, and what they have to agree on.

How they meet is `src/ranks/rendezvous.py`. Composer and streaming read `NODE_RANK` when they are called. torchrun calls it
`GROUP_RANK`.
"""

import json
import os
import socket
import statistics
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

from src.common.errors import UserError, first_line
from src.common.machine import SHARED_MEMORY, shared_memory_is_low

ALONE = {'RANK': '0', 'WORLD_SIZE': '1', 'LOCAL_RANK': '0', 'LOCAL_WORLD_SIZE': '1', 'NODE_RANK': '0'}
LAUNCH = 'start the run with `composer main.py ...` on every node (README, "Several nodes"), not with `python main.py`'
CHECK = ('check that every node is started, each with its own NODE_RANK and all with the same WORLD_SIZE, MASTER_ADDR and '
         'MASTER_PORT; that MASTER_ADDR is an address of node 0 which the others reach (127.0.0.1 and 0.0.0.0 are not) and no '
         'firewall closes its ports; and, where a node has several networks, set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME')

# What starts several processes without the variables of a launcher: how many, by the first of these that is set.
TASKS = {'srun': ('SLURM_STEP_NUM_TASKS', 'SLURM_NTASKS'),
         'mpirun': ('OMPI_COMM_WORLD_SIZE', 'PMI_SIZE', 'MV2_COMM_WORLD_SIZE')}


class Rank(NamedTuple):
    """What one rank tells the others; a rank's place in a list of these is its number, unless `rank` says otherwise."""

    rank: int
    node: int
    host: str
    values: Mapping[str, str]


def fill_node_rank() -> None:
    """Sets NODE_RANK from torchrun's GROUP_RANK, where torchrun started this process."""
    if 'GROUP_RANK' in os.environ:
        os.environ.setdefault('NODE_RANK', os.environ['GROUP_RANK'])



def check_environment(env: Mapping[str, str]) -> None:
    """Holds the launcher's variables against each other, before Composer reads any of them.

    Args:
        env: `os.environ`. Without any of the variables, or with those of one process alone, there is nothing to check.

    Raises:
        UserError: A variable is missing, no whole number, out of range or contradicts another; MASTER_ADDR has no address.
    """
    if all(env.get(name, value) == value for name, value in ALONE.items()):
        _check_alone(env)
        return
    errors, n = [], {}
    absent = [name for name in (*ALONE, 'MASTER_ADDR', 'MASTER_PORT') if not env.get(name)]
    if absent:
        given = ', '.join(f'{name}={env[name]}' for name in (*ALONE, 'MASTER_ADDR', 'MASTER_PORT') if env.get(name))
        errors.append(f'{", ".join(absent)}: not set, although {given} is; a launcher sets all of them: {LAUNCH}')
    for name in (*ALONE, 'MASTER_PORT'):
        least, most = int(name.endswith('SIZE') or name == 'MASTER_PORT'), 65535 if name == 'MASTER_PORT' else 1 << 31
        if name not in absent:
            n[name] = int(env[name]) if env[name].strip().isdecimal() else None
            if n[name] is None or not least <= n[name] <= most:
                allowed = 'from 1 to 65535' if name == 'MASTER_PORT' else f'of at least {least}'
                errors.append(f'{name}: {env[name]!r} must be a whole number {allowed}')
                n[name] = None
    errors += _contradictions(n)
    if env.get('MASTER_ADDR'):
        try:
            socket.getaddrinfo(env['MASTER_ADDR'], None)
        except (OSError, UnicodeError) as e:
            errors.append(f'MASTER_ADDR: {env["MASTER_ADDR"]!r} has no address here ({e}); set that of node 0, as 10.0.0.1')
    if errors:
        head = f'{len(errors)} mistake{"s" * (len(errors) > 1)} in the environment of {here(env)}:'
        raise UserError('\n'.join([head, *(f'  - {e}' for e in errors)]))


def _check_alone(env: Mapping[str, str]) -> None:
    """Refuses one of several tasks of Slurm or MPI that knows of no others: each would train the whole model, alone."""
    if env.get('WORLD_SIZE'):
        return
    for starter, names in TASKS.items():
        name = next((name for name in names if env.get(name)), None)
        # sbatch's own shell and salloc's have SLURM_NTASKS too: of a task, SLURM_PROCID is set
        if name and env[name].isdecimal() and int(env[name]) > 1 and (starter != 'srun' or env.get('SLURM_PROCID')):
            raise UserError(f'WORLD_SIZE: not set, and {name}={env[name]}: each of {env[name]} tasks would train the '
                            f'whole model alone. Start one task on each node with {starter}, and in it `composer '
                            'main.py ...` with WORLD_SIZE, NODE_RANK, MASTER_ADDR and MASTER_PORT, as the script in '
                            'README, "Several nodes", does. If this process is to train alone, set WORLD_SIZE=1')


def _contradictions(n: Mapping[str, Optional[int]]) -> list[str]:
    rank, world, local, per_node, node = (n.get(name) for name in ALONE)
    errors = []
    if rank is not None and world is not None and rank >= world:
        errors.append(f'RANK: {rank} must be below WORLD_SIZE, which is {world}')
    if local is not None and per_node is not None and local >= per_node:
        errors.append(f'LOCAL_RANK: {local} must be below LOCAL_WORLD_SIZE, which is {per_node}')
    if world is None or per_node is None or node is None:
        return errors
    if world % per_node:  # streaming, too, takes every node to have as many
        errors.append(f'WORLD_SIZE: {world}, the processes of all nodes, must be a multiple of LOCAL_WORLD_SIZE, the {per_node} '
                      'of this one: every node needs the same number of processes (composer -n)')
    elif node >= world // per_node:
        errors.append(f'NODE_RANK: {node} must be below {world // per_node}, the number of nodes (WORLD_SIZE {world} / '
                      f'LOCAL_WORLD_SIZE {per_node}); count nodes from 0')
    elif rank is not None and local is not None and rank != node * per_node + local:
        errors.append(f'RANK: {rank} must be {node * per_node + local} = NODE_RANK {node} * LOCAL_WORLD_SIZE {per_node} + '
                      f'LOCAL_RANK {local}; leave --base_rank and RANK to the launcher')
    return errors


@contextmanager
def explained(what: str) -> Iterator[None]:
    """torch's errors (all of them RuntimeErrors), with the node's settings and what to look at."""
    started = time.monotonic()
    try:
        yield
    except RuntimeError as e:
        env = os.environ
        if 'EADDRINUSE' in str(e):
            raise UserError(f'MASTER_PORT: {env["MASTER_PORT"]} is in use on {here()}: by another run, or by a second node with '
                            'NODE_RANK=0; set another, on every node') from e
        seconds = time.monotonic() - started
        raise UserError(f'{here()}: {what}: {first_line(e)}, after {seconds:.0f} s, with '
                        f'MASTER_ADDR:MASTER_PORT {env.get("MASTER_ADDR")}:{env.get("MASTER_PORT")} and WORLD_SIZE '
                        f'{env.get("WORLD_SIZE")}{shared_memory_is_low()}; {CHECK}') from e


def agree(what: str, settings: Mapping[str, Any]) -> None:
    """Compares settings among all ranks, which must all call this.

    Args:
        what: The start of the message, as `config`.
        settings: Flat, from name to value, with secrets masked: values are shown, and compared as they are shown.

    Raises:
        UserError: On every rank, where ranks differ: the setting, its values, and where each holds.
    """
    errors = differences(_gather({name: repr(value) for name, value in settings.items()}))
    if errors:
        raise UserError('\n  - '.join([f'{what}: the nodes disagree; start every node with the same YAML, arguments and files:',
                                       *errors[:20], *([f'and {len(errors) - 20} more'] if len(errors) > 20 else [])]))


def preflight() -> str:
    """Sums a tensor over all ranks before hours of training depend on it; all ranks must call this.

    Returns:
        Lines for the log: the devices of each node and, with several ranks, how fast the sum was. The bus bandwidth is bytes /
        seconds * 2 (n - 1) / n, as nccl-tests define it (https://github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md): comparable
        with the hardware's, for any number n of ranks.

    Raises:
        UserError: A sum is wrong: whose part of it, and on which ranks. Or the ranks cannot reach each other. Or two
            nodes share one /dev/shm.
    """
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'
    ranks = _gather({'device': device})
    devices: dict[tuple[int, str, str], int] = {}
    for r in ranks:
        key = (r.node, r.host, r.values['device'])
        devices[key] = devices.get(key, 0) + 1
    nodes = len({r.node for r in ranks})
    each = [f'node {node} {host} {count} x {device}' for (node, host, device), count in devices.items()]
    line = f'devices: {len(ranks)} on {nodes} node{"s" * (nodes > 1)}: {", ".join(each)}'
    if len(ranks) == 1:
        return line
    if nodes > 1:
        _check_shared_memory_apart()
    _check_sum(ranks, rank() + 1)
    return f'{line}\n{_time_sum(len(ranks))}'


def _check_shared_memory_apart() -> None:
    """Refuses nodes that share one /dev/shm, where streaming takes the ranks of a machine for those of one node.

    The first rank of each node makes a file there, and looks for the files of the other nodes.
    """
    if not SHARED_MEMORY.is_dir():
        return
    mark = SHARED_MEMORY / f'node-{uuid.uuid4().hex}' if os.environ.get('LOCAL_RANK') == '0' else None
    try:
        if mark:
            mark.touch()
        ranks = _gather({'mark': mark.name if mark else ''})
        node = int(os.environ['NODE_RANK'])
        others = {r.values['mark'] for r in ranks if r.node != node} - {''}
        seen = _gather({'sees': json.dumps([name for name in others if (SHARED_MEMORY / name).exists()])})
    finally:
        if mark:
            mark.unlink()
    marks = {name for r in seen for name in json.loads(r.values['sees'])}
    sharing = [r for r in ranks if r.values['mark'] in marks]
    if sharing:
        which = places(sharing, [r for r in ranks if r.values['mark']])
        raise UserError(f'{which} share one {SHARED_MEMORY}, and each node needs its own: these nodes are launchers on '
                        'one machine, or containers with --ipc=host. Start one node with the ranks of all of them '
                        f'(composer -n), or give each container its own {SHARED_MEMORY} (docker run --ipc=private '
                        '--shm-size=16g)')


def _check_sum(ranks: list[Rank], part: float) -> None:
    """Each rank adds `part` in a column of its own, which has to be its rank + 1: so a wrong sum says whose part it lacks."""
    import torch

    columns = torch.zeros(1024, len(ranks), device='cuda' if torch.cuda.is_available() else 'cpu')
    columns[:, rank()] = part
    with explained('the sum over all ranks failed'):
        torch.distributed.all_reduce(columns)
    expected = torch.arange(1, len(ranks) + 1, device=columns.device)
    lost = [i for i, good in enumerate((columns == expected).all(dim=0).tolist()) if not good]
    seen = _gather({'lost': json.dumps(lost)})
    wrong = {i for r in seen for i in json.loads(r.values['lost'])}
    if wrong:
        where = places([r for r in seen if r.values['lost'] != '[]'], seen)
        whose = places([ranks[i] for i in sorted(wrong)], ranks)
        raise UserError(f'all-reduce over {len(ranks)} ranks is wrong: the part of {whose} did not arrive as sent, as seen on '
                        f'{where}; leave the node out, and test its devices and network')


def _time_sum(n: int) -> str:
    import torch

    gpu = torch.cuda.is_available()
    mib, times = 64 if gpu else 8, []
    x = torch.zeros(mib << 18, device='cuda' if gpu else 'cpu')  # zeros stay finite, however often they are summed
    with explained('the sum over all ranks failed'):
        for _ in range(6):  # the first one warms up
            started = time.perf_counter()
            torch.distributed.all_reduce(x)
            if gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    seconds = statistics.median(times[1:])
    speed = (mib << 20) / seconds / 1e9
    return (f'all-reduce: correct; {mib} MiB in {seconds * 1e3:.1f} ms, {speed:.3g} GB/s '
            f'(bus bandwidth {speed * 2 * (n - 1) / n:.3g} GB/s)')


def rank() -> int:
    return int(os.environ.get('RANK', '0'))


def here(env: Mapping[str, str] = os.environ) -> str:
    return f'{socket.gethostname()} (NODE_RANK {env.get("NODE_RANK", "not set")})'


def _gather(values: Mapping[str, str]) -> list[Rank]:
    from composer.utils import dist

    mine = Rank(rank(), int(os.environ.get('NODE_RANK', '0')), socket.gethostname(), values)
    with explained('the ranks cannot exchange messages'):
        return dist.all_gather_object(mine)


def differences(ranks: list[Rank]) -> list[str]:
    errors = []
    for name in sorted({name for r in ranks for name in r.values}):
        at: dict[str, list[Rank]] = {}
        for r in ranks:
            at.setdefault(r.values.get(name, 'not set'), []).append(r)
        if len(at) > 1:
            errors.append(f'{name} is ' + ' and '.join(f'{value} on {places(some, ranks)}' for value, some in at.items()))
    return errors


def places(some: Iterable[Rank], ranks: list[Rank]) -> str:
    """Where these ranks are: whole nodes by name, others one by one."""
    some, whole = list(some), {}
    for r in some:
        mates = [m for m in ranks if (m.node, m.host) == (r.node, r.host)]
        node = f'node {r.node} ({r.host})'
        whole.setdefault(node if all(m in some for m in mates) else f'rank {r.rank} of {node}', None)
    return ', '.join(list(whole)[:6]) + (f' and {len(whole) - 6} more' if len(whole) > 6 else '')

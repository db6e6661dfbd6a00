"""Reads the variables that a launcher sets for each rank, and checks that they fit together."""

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

from src.common import program
from src.common.errors import UserError
from src.common.machine import set_up_output
from src.common.workers import die_with_launcher

SINGLE_PROCESS = {'RANK': '0', 'WORLD_SIZE': '1', 'LOCAL_RANK': '0', 'LOCAL_WORLD_SIZE': '1', 'NODE_RANK': '0'}
RANGES = {**{name: (int(name.endswith('SIZE')), (1 << 31) - 1) for name in SINGLE_PROCESS},
          'MASTER_PORT': (1, (1 << 16) - 1)}
LAUNCH_ADVICE = ('start the run with `composer main.py ...` on every node (see src/ranks/README.md), not with '
                 '`python main.py`')
# Programs that start several processes without a launcher's variables. The first variable that is set has their number.
TASK_COUNTS = {
    'srun': ('SLURM_STEP_NUM_TASKS', 'SLURM_NTASKS'),
    'mpirun': ('OMPI_COMM_WORLD_SIZE', 'PMI_SIZE', 'MV2_COMM_WORLD_SIZE'),
}
WAIT_FOR_RANK_0_S = 10.0  # how long a rank with a UserError waits for rank 0 to report the same error


class Process(NamedTuple):
    """One process of a run. The first five fields are the variables of `SINGLE_PROCESS`, in the same order."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: int
    host: str
    pid: int


def this_process() -> Process:
    """Describes this process by the variables that its launcher set."""
    n = {name: int(os.environ.get(name, value)) for name, value in SINGLE_PROCESS.items()}
    return Process(n['RANK'], n['WORLD_SIZE'], n['LOCAL_RANK'], n['LOCAL_WORLD_SIZE'], n['NODE_RANK'],
                   socket.gethostname(), os.getpid())


def rank() -> int:
    return int(os.environ.get('RANK', '0'))


def this_machine() -> str:
    """Names this machine in messages: its host name and NODE_RANK."""
    return f'{socket.gethostname()} (NODE_RANK {os.environ.get("NODE_RANK", "not set")})'


def fill_node_rank() -> None:
    """Sets NODE_RANK to torchrun's GROUP_RANK if NODE_RANK is not set: Composer and streaming read NODE_RANK."""
    if 'GROUP_RANK' in os.environ:
        os.environ.setdefault('NODE_RANK', os.environ['GROUP_RANK'])


def set_up_rank(check: Callable[[], Any]) -> None:
    """Prepares a rank before torch is imported: the rank ends with its launcher, and can print any text.

    `check` looks for mistakes on the command line. If it raises a UserError, the rank prints the message and exits.
    """
    die_with_launcher()
    set_up_output()
    check_numbers()
    program.check_early(check, leave_together)


def leave_together(error: UserError) -> NoReturn:
    """Ends this rank because of a mistake of the user that it found before it met the others.

    Usually all ranks find it: rank 0 prints the message, and the launcher then ends the others.
    """
    me, text = this_process(), f'error: {error}'
    if me.rank:
        time.sleep(WAIT_FOR_RANK_0_S)
        text = f'rank {me.rank} on node {me.node} ({me.host}):\n{text}'
    sys.exit(text)


def check_numbers() -> None:
    """Exits if a launcher's variable is not a number: the import of Composer would fail with a traceback."""
    if errors := [error for name, error in _find_wrong_numbers(os.environ).items() if name in SINGLE_PROCESS]:
        sys.exit('\n  - '.join([f'error: in the environment of {this_machine()}:', *errors]))


def check_environment(env: Mapping[str, str]) -> None:
    """Checks that the launcher's variables fit together, before Composer reads them.

    `env` is `os.environ`. A single process needs none of the variables. Raises UserError if a variable is missing
    or contradicts another, where MASTER_ADDR has no address, where MASTER_PORT cannot be a port, or where Slurm or MPI
    started several processes that would each train alone.
    """
    if all(env.get(name, value) == value for name, value in SINGLE_PROCESS.items()):
        _check_is_only_task(env)
        return
    if errors := list(_find_mistakes(env)):
        head = f'{len(errors)} mistake{"s" * (len(errors) > 1)} in the environment of {this_machine()}:'
        raise UserError('\n  - '.join([head, *errors]))


def _check_is_only_task(env: Mapping[str, str]) -> None:
    """Raises UserError if Slurm or MPI started several tasks without WORLD_SIZE: each would train the whole model."""
    if env.get('WORLD_SIZE'):
        return
    for starter, names in TASK_COUNTS.items():
        name = next((name for name in names if env.get(name)), None)
        # The shells of sbatch and salloc have SLURM_NTASKS too; only a task of srun has SLURM_PROCID.
        if name and env[name].isdecimal() and int(env[name]) > 1 and (starter != 'srun' or env.get('SLURM_PROCID')):
            raise UserError(f'WORLD_SIZE: not set, and {name}={env[name]}: each of {env[name]} tasks would train the '
                            f'whole model alone. Start one task on each node with {starter}, and let the task start '
                            '`composer main.py ...` with WORLD_SIZE, NODE_RANK, MASTER_ADDR and MASTER_PORT, as the '
                            'Slurm script in src/ranks/README.md does. To train in this process alone, set '
                            'WORLD_SIZE=1')


def _find_wrong_numbers(env: Mapping[str, str]) -> dict[str, str]:
    """Maps each variable that is set, and is not a number in its range, to a message."""
    return {name: f'{name}: {env[name]!r} must be a whole number from {least} to {most}'
            for name, (least, most) in RANGES.items()
            if name in env and not (env[name].strip().isdecimal() and least <= int(env[name]) <= most)}


def _find_mistakes(env: Mapping[str, str]) -> Iterator[str]:
    """Yields a message for each mistake in the variables of one of several ranks."""
    needed = (*SINGLE_PROCESS, 'MASTER_ADDR', 'MASTER_PORT')
    if missing := [name for name in needed if not env.get(name)]:
        present = ', '.join(f'{name}={env[name]}' for name in needed if env.get(name))
        yield f'{", ".join(missing)}: not set, although {present} is set; a launcher sets all of them: {LAUNCH_ADVICE}'
    wrong = {name: error for name, error in _find_wrong_numbers(env).items() if name not in missing}
    yield from wrong.values()
    if not {*wrong, *missing}.intersection(SINGLE_PROCESS):
        yield from _find_contradictions(*(int(env[name]) for name in SINGLE_PROCESS))
    if address := env.get('MASTER_ADDR'):
        try:
            socket.getaddrinfo(address, None)
        except (OSError, UnicodeError) as e:
            yield f'MASTER_ADDR: {address!r} has no address here ({e}); set the address of node 0, such as 10.0.0.1'


def _find_contradictions(rank: int, world: int, local: int, per_node: int, node: int) -> Iterator[str]:
    if local >= per_node:
        yield f'LOCAL_RANK: {local} must be below LOCAL_WORLD_SIZE, which is {per_node}'
    elif world % per_node:  # streaming, too, expects the same number of ranks on every node
        yield (f'WORLD_SIZE: {world}, the processes of all nodes, must be a multiple of LOCAL_WORLD_SIZE, the '
               f'{per_node} processes of this node: every node needs the same number of processes (composer -n)')
    elif node >= world // per_node:
        yield (f'NODE_RANK: {node} must be below {world // per_node}, the number of nodes (WORLD_SIZE {world} / '
               f'LOCAL_WORLD_SIZE {per_node}); count nodes from 0')
    elif rank != node * per_node + local:
        yield (f'RANK: {rank} must be {node * per_node + local} = NODE_RANK {node} * LOCAL_WORLD_SIZE {per_node} + '
               f'LOCAL_RANK {local}; leave --base_rank and RANK to the launcher')

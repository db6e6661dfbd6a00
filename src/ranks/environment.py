"""What the launcher set for this process, in the environment, and whether that can be right."""

import os
import socket
import sys
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from src.common.errors import UserError
from src.common.machine import set_up_output
from src.common.workers import die_with_launcher

SINGLE_PROCESS = {'RANK': '0', 'WORLD_SIZE': '1', 'LOCAL_RANK': '0', 'LOCAL_WORLD_SIZE': '1', 'NODE_RANK': '0'}
RANGES = {**{name: (int(name.endswith('SIZE')), (1 << 31) - 1) for name in SINGLE_PROCESS},
          'MASTER_PORT': (1, (1 << 16) - 1)}
LAUNCH = 'start the run with `composer main.py ...` on every node (README, "Several nodes"), not with `python main.py`'
# What starts several processes without the variables of a launcher: how many, by the first of these that is set.
TASKS = {
    'srun': ('SLURM_STEP_NUM_TASKS', 'SLURM_NTASKS'),
    'mpirun': ('OMPI_COMM_WORLD_SIZE', 'PMI_SIZE', 'MV2_COMM_WORLD_SIZE'),
}


class Process(NamedTuple):
    """One process of a run; the numbers are those of `ALONE`, in its order."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: int
    host: str
    pid: int


def this_process() -> Process:
    """This process, as its launcher set it up."""
    n = {name: int(os.environ.get(name, value)) for name, value in SINGLE_PROCESS.items()}
    return Process(n['RANK'], n['WORLD_SIZE'], n['LOCAL_RANK'], n['LOCAL_WORLD_SIZE'], n['NODE_RANK'],
                   socket.gethostname(), os.getpid())


def rank() -> int:
    return int(os.environ.get('RANK', '0'))


def this_machine() -> str:
    """This machine, for messages."""
    return f'{socket.gethostname()} (NODE_RANK {os.environ.get("NODE_RANK", "not set")})'


def fill_node_rank() -> None:
    """Sets NODE_RANK, which Composer and streaming read, from torchrun's GROUP_RANK."""
    if 'GROUP_RANK' in os.environ:
        os.environ.setdefault('NODE_RANK', os.environ['GROUP_RANK'])


def set_up_rank() -> None:
    """The first thing that a program does in each rank: it ends with its launcher, and prints any text."""
    die_with_launcher()
    set_up_output()
    check_numbers()


def check_numbers() -> None:
    """Ends this process where a variable of the launcher is no number, with which Composer cannot be imported."""
    if errors := [error for name, error in _no_numbers(os.environ).items() if name in SINGLE_PROCESS]:
        sys.exit('\n  - '.join([f'error: in the environment of {this_machine()}:', *errors]))


def check_environment(env: Mapping[str, str]) -> None:
    """Holds the launcher's variables against each other, before Composer reads any of them.

    `env` is `os.environ`. Without any of the variables, or with those of one process alone, there is nothing to
    compare. Raises UserError where a variable is missing or contradicts another, where MASTER_ADDR has no address or
    MASTER_PORT cannot be a port, or where this is one of several tasks that know nothing of each other.
    """
    if all(env.get(name, value) == value for name, value in SINGLE_PROCESS.items()):
        _check_alone(env)
        return
    if errors := list(_mistakes(env)):
        head = f'{len(errors)} mistake{"s" * (len(errors) > 1)} in the environment of {this_machine()}:'
        raise UserError('\n  - '.join([head, *errors]))


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


def _no_numbers(env: Mapping[str, str]) -> dict[str, str]:
    return {name: f'{name}: {env[name]!r} must be a whole number from {least} to {most}'
            for name, (least, most) in RANGES.items()
            if name in env and not (env[name].strip().isdecimal() and least <= int(env[name]) <= most)}


def _mistakes(env: Mapping[str, str]) -> Iterator[str]:
    needed = (*SINGLE_PROCESS, 'MASTER_ADDR', 'MASTER_PORT')
    if absent := [name for name in needed if not env.get(name)]:
        given = ', '.join(f'{name}={env[name]}' for name in needed if env.get(name))
        yield f'{", ".join(absent)}: not set, although {given} is; a launcher sets all of them: {LAUNCH}'
    wrong = {name: error for name, error in _no_numbers(env).items() if name not in absent}
    yield from wrong.values()
    if not {*wrong, *absent}.intersection(SINGLE_PROCESS):
        yield from _contradictions(*(int(env[name]) for name in SINGLE_PROCESS))
    if address := env.get('MASTER_ADDR'):
        try:
            socket.getaddrinfo(address, None)
        except (OSError, UnicodeError) as e:
            yield f'MASTER_ADDR: {address!r} has no address here ({e}); set that of node 0, as 10.0.0.1'


def _contradictions(rank: int, world: int, local: int, per_node: int, node: int) -> Iterator[str]:
    if local >= per_node:
        yield f'LOCAL_RANK: {local} must be below LOCAL_WORLD_SIZE, which is {per_node}'
    elif world % per_node:  # streaming, too, takes every node to have as many
        yield (f'WORLD_SIZE: {world}, the processes of all nodes, must be a multiple of LOCAL_WORLD_SIZE, the '
               f'{per_node} of this one: every node needs the same number of processes (composer -n)')
    elif node >= world // per_node:
        yield (f'NODE_RANK: {node} must be below {world // per_node}, the number of nodes (WORLD_SIZE {world} / '
               f'LOCAL_WORLD_SIZE {per_node}); count nodes from 0')
    elif rank != node * per_node + local:
        yield (f'RANK: {rank} must be {node * per_node + local} = NODE_RANK {node} * LOCAL_WORLD_SIZE {per_node} + '
               f'LOCAL_RANK {local}; leave --base_rank and RANK to the launcher')

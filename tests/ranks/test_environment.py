"""The variables that a launcher sets for a rank, and the messages about mistakes in them."""

import os
import socket

import pytest

from src.common.errors import UserError
from src.ranks import agreement, environment, preflight
from src.ranks.environment import Process

HOSTNAME = socket.gethostname()


def launched(**changes: str | None) -> dict[str, str]:
    """The variables of rank 9 of 16, on node 1 of 2, with changes; None removes a variable."""
    env = dict(RANK='9', WORLD_SIZE='16', LOCAL_RANK='1', LOCAL_WORLD_SIZE='8', NODE_RANK='1', MASTER_ADDR='127.0.0.1',
               MASTER_PORT='7501') | changes
    return {name: value for name, value in env.items() if value is not None}


ONLY_USER = dict(RANK=None, LOCAL_RANK=None, LOCAL_WORLD_SIZE=None)
MISTAKES = {
    'no port': (dict(MASTER_PORT=None), ['1 mistake', 'MASTER_PORT: not set, although RANK=9', 'a launcher sets all of them']),
    'empty': (dict(NODE_RANK=''), ['NODE_RANK: not set']),
    'python instead of composer': (ONLY_USER, ['RANK, LOCAL_RANK, LOCAL_WORLD_SIZE: not set, although WORLD_SIZE=16, NODE_RANK=1',
                                               'composer main.py ...', 'not with `python main.py`']),
    'a word': (dict(NODE_RANK='one'), ["NODE_RANK: 'one' must be a whole number from 0 to"]),
    'negative': (dict(RANK='-1'), ["RANK: '-1' must be a whole number from 0 to"]),
    'no process': (dict(WORLD_SIZE='0'), ["WORLD_SIZE: '0' must be a whole number from 1 to"]),
    'local rank': (dict(LOCAL_RANK='8', RANK='16'), ['LOCAL_RANK: 8 must be below LOCAL_WORLD_SIZE, which is 8']),
    'port': (dict(MASTER_PORT='75010'), ["MASTER_PORT: '75010' must be a whole number from 1 to 65535"]),
    'port 0': (dict(MASTER_PORT='0'), ["MASTER_PORT: '0' must be"]),
    'address': (dict(MASTER_ADDR='no-such.invalid'), ["MASTER_ADDR: 'no-such.invalid' has no address here", '10.0.0.1']),
    'node counted from 1': (dict(NODE_RANK='2'), ['NODE_RANK: 2 must be below 2, the number of nodes', 'count nodes from 0']),
    'uneven nodes': (dict(WORLD_SIZE='12'), ['WORLD_SIZE: 12, the processes of all nodes, must be a multiple of '
                                             'LOCAL_WORLD_SIZE, the 8 processes of this node', 'composer -n']),
    'contradiction': (dict(RANK='8'), ['RANK: 8 must be 9 = NODE_RANK 1 * LOCAL_WORLD_SIZE 8 + LOCAL_RANK 1']),
    'several': (dict(NODE_RANK='x', MASTER_PORT='x', LOCAL_RANK=None),
                ['3 mistakes', 'LOCAL_RANK: not set', "NODE_RANK: 'x'", "MASTER_PORT: 'x'"]),
}


def test_blanks_around_a_number_are_as_int_reads_them():
    environment.check_environment(launched(RANK=' 9', MASTER_PORT='7501 '))


@pytest.mark.parametrize('kind', MISTAKES)
def test_mistakes_in_the_environment_are_named(kind):
    changes, parts = MISTAKES[kind]
    with pytest.raises(UserError) as e:
        environment.check_environment(launched(**changes))
    for part in [f'in the environment of {HOSTNAME} (NODE_RANK', *parts]:
        assert part in str(e.value)
    assert str(e.value).count('\n  - ') == int(str(e.value)[0])


# Variables of a task that Slurm or MPI has started, and whether it started several tasks
TASKS = [({'SLURM_NTASKS': '4', 'SLURM_PROCID': '3'}, True), ({'SLURM_NTASKS': '4', 'SLURM_PROCID': '0'}, True),
         ({'SLURM_NTASKS': '4', 'SLURM_PROCID': '0', 'SLURM_STEP_NUM_TASKS': '1'}, False),  # a shell of salloc
         ({'SLURM_NTASKS': '4'}, False), ({'SLURM_NTASKS': '1', 'SLURM_PROCID': '0'}, False),
         ({'SLURM_NTASKS': '4', 'SLURM_PROCID': '0', 'WORLD_SIZE': '1'}, False),
         ({'OMPI_COMM_WORLD_SIZE': '4'}, True), ({'PMI_SIZE': '1'}, False),
         ({'PMI_SIZE': 'many'}, False)]


@pytest.mark.parametrize(('env', 'several'), TASKS)
def test_one_of_several_tasks_does_not_train_alone(env, several):
    if not several:
        environment.check_environment(env)
        return
    with pytest.raises(UserError, match='=4: each of 4 tasks would train the whole model alone. Start .*composer main'):
        environment.check_environment(env)


@pytest.mark.parametrize('env', [{}, {'MASTER_ADDR': '10.0.0.1', 'MASTER_PORT': '7501'}, environment.SINGLE_PROCESS,
                                 {'WORLD_SIZE': '1'}, launched(), launched(RANK='0', NODE_RANK='0', LOCAL_RANK='0'), launched(MASTER_ADDR='::1')])
def test_a_right_environment_passes(env):
    environment.check_environment(env)


def test_the_node_rank_is_that_of_torchrun(monkeypatch):
    monkeypatch.setenv('NODE_RANK', '0')
    monkeypatch.delenv('NODE_RANK')
    monkeypatch.setenv('GROUP_RANK', '3')
    environment.fill_node_rank()
    assert os.environ['NODE_RANK'] == '3'
    monkeypatch.setenv('GROUP_RANK', '4')
    environment.fill_node_rank()
    assert os.environ['NODE_RANK'] == '3', 'one that is set stays'


def test_alone_there_is_nothing_to_compare(monkeypatch):
    for name in (*environment.SINGLE_PROCESS, 'GROUP_RANK'):
        monkeypatch.delenv(name, raising=False)
    agreement.check_ranks_agree('config', {'a': 1})
    assert preflight.preflight() == f'devices: 1 on 1 node: node 0 {HOSTNAME} 1 x CPU'


def test_nodes_that_share_one_memory_are_named():
    memories = {Process(i, 4, i % 2, 2, i // 2, f'host-{i // 2}', 7 + i): 'a' for i in range(4)}
    with pytest.raises(UserError, match=r'^node 0 \(host-0\), node 1 \(host-1\) share one /dev/shm'):
        preflight.check_shared_memory_apart(memories)
    preflight.check_shared_memory_apart({process: f'{memory}{process.node}' for process, memory in memories.items()})
    preflight.check_shared_memory_apart(dict.fromkeys(memories, ''))


def test_whole_nodes_are_named_and_parts_by_their_ranks():
    ranks = [Process(i, 4, i % 2, 2, i // 2, f'host-{i // 2}', 7 + i) for i in range(4)]
    assert agreement.describe_ranks(ranks[:3], ranks) == 'node 0 (host-0), rank 2 of node 1 (host-1)'
    assert agreement.find_differences({process: {'a': str(process.node)} for process in ranks}) == [
        'a is 0 on node 0 (host-0) and 1 on node 1 (host-1)']


def test_no_program_begins_with_a_rank_that_is_no_number(monkeypatch):
    environment.check_numbers()
    for value in ('one', ''):
        monkeypatch.setenv('RANK', value)
        with pytest.raises(SystemExit, match=f"error: in the environment of .*\n  - RANK: '{value}' must be a whole number"):
            environment.check_numbers()


def test_of_many_differences_the_first_are_told(monkeypatch):
    told = {Process(i, 2, i, 2, 0, 'host', 7 + i): {f's{n}': str(i) for n in range(25)} for i in range(2)}
    monkeypatch.setattr(agreement, 'gather_from_ranks', lambda settings: told)
    with pytest.raises(UserError) as e:
        agreement.check_ranks_agree('config', {})
    assert str(e.value).count('\n  - ') == 21 and str(e.value).endswith('\n  - and 5 more')

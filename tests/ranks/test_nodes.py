"""Several nodes: what the launchers set, how ranks meet, what they must agree on, and what is said when they do not."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hosts import NODE, Host, hosts, need_nodes, outputs, start
from launch import ROOT, SCRIPTS, clean_env, console, free_port, tiny

from src.common.errors import UserError
from src.ranks import environment

QUICKSTART = 'yamls/quickstart.yaml'
SHORT = ('max_duration=4ba', 'eval_interval=4ba', 'scheduler.t_warmup=1ba')
HERE = socket.gethostname()


# ---------------------------------------------------------------- the environment


def launched(**changes: str | None) -> dict[str, str]:
    """What a launcher sets for rank 9 of 16, on node 1 of 2; None removes."""
    env = dict(RANK='9', WORLD_SIZE='16', LOCAL_RANK='1', LOCAL_WORLD_SIZE='8', NODE_RANK='1', MASTER_ADDR='127.0.0.1',
               MASTER_PORT='7501') | changes
    return {name: value for name, value in env.items() if value is not None}


ONLY_USER = dict(RANK=None, LOCAL_RANK=None, LOCAL_WORLD_SIZE=None)
MISTAKES = {
    'no port': (dict(MASTER_PORT=None), ['1 mistake', 'MASTER_PORT: not set, although RANK=9', 'a launcher sets all of them']),
    'empty': (dict(NODE_RANK=''), ['NODE_RANK: not set']),
    'python instead of composer': (ONLY_USER, ['RANK, LOCAL_RANK, LOCAL_WORLD_SIZE: not set, although WORLD_SIZE=16, NODE_RANK=1',
                                               'composer main.py ...', 'not with `python main.py`']),
    'a word': (dict(NODE_RANK='one'), ["NODE_RANK: 'one' must be a whole number of at least 0"]),
    'negative': (dict(RANK='-1'), ["RANK: '-1' must be a whole number of at least 0"]),
    'no process': (dict(WORLD_SIZE='0'), ["WORLD_SIZE: '0' must be a whole number of at least 1"]),
    'port': (dict(MASTER_PORT='75010'), ["MASTER_PORT: '75010' must be a whole number from 1 to 65535"]),
    'port 0': (dict(MASTER_PORT='0'), ["MASTER_PORT: '0' must be"]),
    'address': (dict(MASTER_ADDR='no-such.invalid'), ["MASTER_ADDR: 'no-such.invalid' has no address here", '10.0.0.1']),
    'rank': (dict(RANK='16'), ['RANK: 16 must be below WORLD_SIZE, which is 16']),
    'local rank': (dict(LOCAL_RANK='8', RANK='15'), ['LOCAL_RANK: 8 must be below LOCAL_WORLD_SIZE, which is 8']),
    'node counted from 1': (dict(NODE_RANK='2'), ['NODE_RANK: 2 must be below 2, the number of nodes', 'count nodes from 0']),
    'uneven nodes': (dict(WORLD_SIZE='12'), ['WORLD_SIZE: 12, the processes of all nodes, must be a multiple of '
                                             'LOCAL_WORLD_SIZE, the 8 of this one', 'composer -n']),
    'contradiction': (dict(RANK='8'), ['RANK: 8 must be 9 = NODE_RANK 1 * LOCAL_WORLD_SIZE 8 + LOCAL_RANK 1']),
    'several': (dict(NODE_RANK='x', MASTER_PORT='x', LOCAL_RANK=None),
                ['3 mistakes', 'LOCAL_RANK: not set', "NODE_RANK: 'x'", "MASTER_PORT: 'x'"]),
}


@pytest.mark.parametrize('kind', MISTAKES)
def test_mistakes_in_the_environment_are_named(kind):
    changes, parts = MISTAKES[kind]
    with pytest.raises(UserError) as e:
        environment.check_environment(launched(**changes))
    for part in [f'in the environment of {HERE} (NODE_RANK', *parts]:
        assert part in str(e.value)
    assert str(e.value).count('\n  - ') == int(str(e.value)[0])


# Variables of a task that Slurm or MPI has started, and whether there are several of them
TASKS = [({'SLURM_NTASKS': '4', 'SLURM_PROCID': '3'}, True), ({'SLURM_NTASKS': '4', 'SLURM_PROCID': '0'}, True),
         ({'SLURM_NTASKS': '4', 'SLURM_PROCID': '0', 'SLURM_STEP_NUM_TASKS': '1'}, False),  # a shell of salloc
         ({'SLURM_NTASKS': '4'}, False), ({'SLURM_NTASKS': '1', 'SLURM_PROCID': '0'}, False),
         ({'SLURM_NTASKS': '4', 'SLURM_PROCID': '0', 'WORLD_SIZE': '1'}, False),
         ({'OMPI_COMM_WORLD_SIZE': '4'}, True), ({'PMI_SIZE': '1'}, False)]


@pytest.mark.parametrize(('env', 'several'), TASKS)
def test_one_of_several_tasks_does_not_train_alone(env, several):
    if not several:
        environment.check_environment(env)
        return
    with pytest.raises(UserError, match='=4: each of 4 tasks would train the whole model alone. Start .*composer main'):
        environment.check_environment(env)


@pytest.mark.parametrize('env', [{}, {'MASTER_ADDR': '10.0.0.1', 'MASTER_PORT': '7501'}, environment.ALONE, {'WORLD_SIZE': '1'},
                                 launched(), launched(RANK='0', NODE_RANK='0', LOCAL_RANK='0'), launched(MASTER_ADDR='::1')])
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


# ---------------------------------------------------------------- meeting

# Forks ranks from a process that has imported Composer once: argv[1] is JSON, from a case's name to its ranks' variables.
# Each rank meets the others, then does what TASK says.
RANKS = """
import json, os, sys, time
from src.ranks import environment, rendezvous
from src.common.errors import UserError
import torch
import composer.utils.dist

def rank(env, out):
    started = time.monotonic()
    os.environ.update(env)
    try:
        environment.check_environment(os.environ)
        rendezvous.initialize(float(env['TIMEOUT']))
        text = 'met'
        task = env.get('TASK', 'preflight').split()
        if task[0] == 'agree':
            environment.agree('config', json.loads(task[1]))
        if task[0] == 'part':
            environment._check_sum(environment._gather({}), float(task[1]))
        if task[0] == 'preflight':
            rendezvous.initialize(1)  # and again: nothing to do
            environment.agree('config', {'seed': 17})
            text = environment.preflight()
    except UserError as e:
        text = str(e)
    print(json.dumps([text, round(time.monotonic() - started, 1)]), file=out, flush=True)

pipes = []
for case, envs in json.loads(sys.argv[1]).items():
    for env in envs:
        end, start = os.pipe()
        if os.fork() == 0:
            os.close(end)
            try:
                rank(env, os.fdopen(start, 'w'))
            finally:
                os._exit(0)
        os.close(start)
        pipes.append((case, os.fdopen(end)))
results = {}
for case, pipe in pipes:
    results.setdefault(case, []).append(json.loads(pipe.read() or '["died", 0]'))
print('RESULTS ' + json.dumps(results))
"""


def rank_env(rank: int, port: int, timeout: float = 60, task: str = 'none', **changes: str) -> dict[str, str]:
    """Node `rank` of two, with one process."""
    return dict(RANK=str(rank), NODE_RANK=str(rank), LOCAL_RANK='0', LOCAL_WORLD_SIZE='1', WORLD_SIZE='2',
                MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), TIMEOUT=str(timeout), TASK=task) | changes


def results(text: str) -> dict[str, list[tuple[str, float]]]:
    found = re.findall('^RESULTS (.*)$', text, re.MULTILINE)
    assert found, text[-3000:]
    return json.loads(found[0])


@pytest.fixture(scope='module')
def met():
    """Every case at the same time, on ports of their own; what each rank said, and after how many seconds."""
    taken, silent = socket.create_server(('', 0)), socket.create_server(('127.0.0.1', 0))
    p = iter(sorted({free_port() for _ in range(40)}))
    cases: dict[str, list[dict[str, str]]] = {}

    def case(name: str, *ranks: dict[str, str], **common: str) -> None:
        port = str(next(p))
        cases[name] = [r | ({'MASTER_PORT': port} if r['MASTER_PORT'] == '0' else {}) | common for r in ranks]

    case('well', *[rank_env(n, 0, task='preflight', NODE_RANK='0', LOCAL_RANK=str(n), LOCAL_WORLD_SIZE='2')
                   for n in (0, 1)])
    case('one /dev/shm', rank_env(0, 0, task='preflight'), rank_env(1, 0, task='preflight'))
    case('unreachable', rank_env(1, 0, 4))
    case('missing', rank_env(0, 0, 4), rank_env(1, 0, 60), WORLD_SIZE='3')
    case('twins', rank_env(0, 0), rank_env(1, 0), rank_env(1, 0), WORLD_SIZE='3')
    case('world size', rank_env(0, 0), rank_env(1, 0, WORLD_SIZE='4'))
    case('processes', rank_env(0, 0, WORLD_SIZE='4'), rank_env(2, 0, LOCAL_WORLD_SIZE='2', NODE_RANK='1', WORLD_SIZE='4'))
    case('port taken', rank_env(0, taken.getsockname()[1]))
    case('another program', rank_env(1, silent.getsockname()[1], 4))
    case('agree', rank_env(0, 0, task='agree {"optimizer.lr":0.001,"seed":17}'),
         rank_env(1, 0, task='agree {"optimizer.lr":0.002,"seed":17,"new":"x"}'))
    one_node = dict(NODE_RANK='0', LOCAL_WORLD_SIZE='2')
    case('agree in a node', rank_env(0, 0, task='agree {"a":1}', **one_node),
         rank_env(1, 0, task='agree {"a":2}', LOCAL_RANK='1', **one_node))
    case('wrong part', rank_env(0, 0, task='part 1'), rank_env(1, 0, task='part 7'))
    try:
        done = subprocess.run([sys.executable, '-c', RANKS, json.dumps(cases)], cwd=ROOT, env=clean_env(), capture_output=True,
                              text=True, timeout=300)
    finally:
        taken.close()
        silent.close()
    got = results(done.stdout)
    for name, ranks in got.items():
        print(name, *ranks, sep='\n    ')
    return got


WELL = (rf'devices: 2 on (?:1 node: node 0 {HERE} 2|2 nodes: node 0 {HERE} 1 x CPU, node 1 {HERE} 1) x CPU\n'
        r'all-reduce: correct; 8 MiB in [\d.]+ ms, ([\d.e+]+) GB/s \(bus bandwidth ([\d.e+]+) GB/s\)')


def test_ranks_that_meet_agree_and_sum(met):
    for text, _ in met['well']:
        match = re.fullmatch(WELL, text)
        assert match, text
        assert match[1] == match[2], 'two ranks: 2 * (2 - 1) / 2 = 1'


ONE_WORLD = 'start every node with its own NODE_RANK, and all with the same composer -n, WORLD_SIZE'
LR = (f'config: the nodes disagree; start every node with the same YAML, arguments and files:\n'
      f'  - new is not set on node 0 ({HERE}) and \'x\' on node 1 ({HERE})\n'
      f'  - optimizer.lr is 0.001 on node 0 ({HERE}) and 0.002 on node 1 ({HERE})')
SAID = {
    'one /dev/shm': [[f'node 0 ({HERE}), node 1 ({HERE}) share one /dev/shm, and each node needs its own',
                      '(composer -n)', '--ipc=private']] * 2,
    'unreachable': [[f'{HERE} (NODE_RANK 1): the ranks do not meet (dist_timeout: 4 s): node 0 does not answer: [Errno 111] '
                     'Connection refused, after 4 s, with MASTER_ADDR:MASTER_PORT 127.0.0.1:', 'WORLD_SIZE 2', environment.CHECK]],
    'missing': [['2 of 3 ranks (WORLD_SIZE) joined at 127.0.0.1:', 'within dist_timeout, 4 s: node 0',
                 'missing are ranks of node 2', environment.CHECK]] * 2,
    'twins': [[f'2 processes have RANK 1, on NODE_RANK 1 ({HERE}), 1 ({HERE})', ONE_WORLD]] * 3,
    'world size': [[f'WORLD_SIZE is 2 on node 0 ({HERE}) and 4 on node 1 ({HERE})', ONE_WORLD]] * 2,
    'processes': [[f'LOCAL_WORLD_SIZE is 1 on node 0 ({HERE}) and 2 on node 1 ({HERE})', ONE_WORLD]] * 2,
    'port taken': [['MASTER_PORT: ', f'is in use on {HERE} (NODE_RANK 0)', 'set another, on every node']],
    'another program': [[f'{HERE} (NODE_RANK 1): the ranks do not meet (dist_timeout: 4 s): no answer in time', environment.CHECK]],
    'agree': [[LR]] * 2,
    'agree in a node': [[f'a is 1 on rank 0 of node 0 ({HERE}) and 2 on rank 1 of node 0 ({HERE})']] * 2,
    'wrong part': [[f'all-reduce over 2 ranks is wrong: the part of node 1 ({HERE}) did not arrive as sent, as seen on '
                    f'node 0 ({HERE}), node 1 ({HERE})']] * 2,
}


@pytest.mark.parametrize('case', SAID)
def test_ranks_that_do_not_fit_are_told_so(met, case):
    assert len(met[case]) == len(SAID[case])
    for (text, _), parts in zip(met[case], SAID[case]):
        for part in parts:
            assert part in text


def test_alone_there_is_nothing_to_compare(monkeypatch):
    for name in (*environment.ALONE, 'GROUP_RANK'):
        monkeypatch.delenv(name, raising=False)
    environment.agree('config', {'a': 1})
    assert environment.preflight() == f'devices: 1 on 1 node: node 0 {HERE} 1 x CPU'


# ---------------------------------------------------------------- two hosts


@pytest.fixture(scope='module')
def two_hosts():
    with hosts() as two:
        yield two


@pytest.fixture(scope='module')
def far(two_hosts):
    """As `met`, for cases that need hosts and addresses of their own."""
    cases: list[dict[str, list[dict[str, str]]]] = [{}, {}]

    def case(name: str, ranks: list[dict[str, str]], **common: str) -> None:
        for of_host, env in zip(cases, ranks):
            of_host[name] = [env | {'MASTER_ADDR': two_hosts[0].address} | common]

    case('well', [rank_env(n, 7501, task='preflight') for n in (0, 1)])
    case('two nodes 0', [rank_env(0, 7502), rank_env(0, 7502)])
    case('no network', [rank_env(n, 7503, 15, GLOO_SOCKET_IFNAME='lo') for n in (0, 1)])
    cases[1]['no route'] = [rank_env(1, 7504, 4, MASTER_ADDR='10.231.7.9')]
    cases[1]['loopback'] = [rank_env(1, 7501, 4)]
    running = [host.start([sys.executable, '-c', RANKS, json.dumps(c)]) for host, c in zip(two_hosts, cases)]
    a, b = (results(text) for text in outputs(running))
    got = {name: [*a.get(name, []), *b[name]] for name in b}
    for name, ranks in got.items():
        print(name, *ranks, sep='\n    ')
    return got


@pytest.mark.slow
def test_hosts_meet_though_their_names_have_no_address(far):
    """gloo alone would offer the other host the address of the loopback device."""
    for text, _ in far['well']:
        assert text.startswith('devices: 2 on 2 nodes: node 0 host-a 1 x CPU, node 1 host-b 1 x CPU\nall-reduce: correct; 8 MiB')


FAR = {
    'two nodes 0': ['2 processes have RANK 0, on NODE_RANK 0 (host-', ONE_WORLD],
    'no network': ['the ranks have met, but cannot connect to each other (dist_timeout: 15 s): ', 'GLOO_SOCKET_IFNAME'],
    'no route': ['host-b (NODE_RANK 1): the ranks do not meet (dist_timeout: 4 s): node 0 does not answer: ', '10.231.7.9:7504'],
    'loopback': ['Connection refused', '127.0.0.1:7501', '127.0.0.1 and 0.0.0.0 are not'],
}


@pytest.mark.parametrize('case', FAR)
def test_hosts_that_do_not_fit_are_told_so(far, case):
    for text, _ in far[case]:
        for part in FAR[case]:
            assert part in text


def train_on(two: list[Host], mds_root: Path, by_argument: bool) -> dict[int, str]:
    """The losses of the tiny model, trained on both hosts."""
    argv = ['main.py', QUICKSTART, *tiny(mds_root, *SHORT)]
    running = []
    for rank, host in enumerate(two):
        values = dict(WORLD_SIZE='2', NODE_RANK=str(rank), MASTER_ADDR=two[0].address, MASTER_PORT='7505')
        arguments = [a for name, value in values.items() for a in (f'--{name.lower()}', value)] if by_argument else []
        running.append(host.composer('-n', '1', *arguments, *argv, **({} if by_argument else values)))
    texts = outputs(running)
    assert [node.returncode for node in running] == [0, 0], '\n'.join(texts)
    assert '2 devices x 1 microbatches of 6' in texts[0] and not console(texts[1])
    return console(texts[0])['loss/train/total']


@pytest.fixture(scope='module')
def one_rank(mds_root, tmp_path_factory):
    """The losses of the same run on one rank."""
    import main
    from src.tools.run_logs import read_run

    folder = tmp_path_factory.mktemp('tb')
    argv = tiny(mds_root, *SHORT, 'log_to_console=false', f'loggers.tensorboard.log_dir={folder}')
    assert main.cli([str(ROOT / QUICKSTART), *argv]) == 0
    return list(read_run(str(folder)).scalars['loss/train/total'].values())


@pytest.mark.slow
@pytest.mark.parametrize('by_argument', [True, pytest.param(False, marks=pytest.mark.slow)], ids=['arguments', 'variables'])
def test_two_hosts_train_as_one_rank_does(two_hosts, mds_root, one_rank, by_argument):
    losses = train_on(two_hosts, mds_root, by_argument)
    assert sorted(losses) == [1, 2, 3, 4]
    assert list(map(float, losses.values())) == pytest.approx(one_rank, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('shared', [True, False], ids=['shared', 'each its own'])
def test_checkpoints_go_to_a_folder_that_all_nodes_share(mds_root, tmp_path, shared):
    need_nodes()
    folder, port = tmp_path / 'saves', str(free_port())
    folder.mkdir()
    own = [] if shared else ['sh', '-c', 'mount -t tmpfs tmpfs "$0" && exec "$@"', str(folder)]
    argv = ['main.py', QUICKSTART, *tiny(mds_root, *SHORT, f'save_folder={folder}', 'save_interval=4ba', 'dist_timeout=60')]
    address = ['--master_addr', '127.0.0.1', '--master_port', port, '--world_size', '2', '-n', '1']
    running = [start([*NODE, *own, str(SCRIPTS / 'composer'), *address, '--node_rank', n, *argv]) for n in '01']
    texts = outputs(running)
    print(*texts)
    said = [text.count(f'save_folder: {folder} on node 1 is not the folder of node 0; name one that all nodes share')
            for text in texts]
    assert 'Traceback' not in texts[0] + texts[1]
    if shared:
        assert ([node.returncode for node in running], said) == ([0, 0], [0, 0]) and 'Eval batch' in texts[0]
        assert sorted(path.name for path in folder.iterdir()) == ['ep0-ba4-rank0.pt', 'ep0-ba4.json']
    else:
        assert all(node.returncode for node in running) and said == [1, 1], 'node 1 says what node 0 does'
        assert 'Eval batch' not in texts[0], 'before anything is computed'


# ---------------------------------------------------------------- other launchers


@pytest.mark.slow
def test_two_nodes_by_torchrun(tmp_path):
    need_nodes()
    script = tmp_path / 'ranks.py'
    script.write_text(f'import os, sys\nsys.path[0] = {str(ROOT)!r}\nfrom src.ranks import environment, rendezvous\n'
                      'environment.check_environment(os.environ)\n'
                      'rendezvous.initialize(60)\nfrom composer.utils import dist\n'
                      'print(f"composer: node {dist.get_node_rank()}")\n'
                      'print(environment.preflight(), flush=True)\nrendezvous.leave()\n')
    address = ['--master_addr', '127.0.0.1', '--master_port', str(free_port())]
    command = [*NODE, str(SCRIPTS / 'torchrun'), '--nnodes', '2', '--nproc_per_node', '1', *address]
    texts = outputs([start([*command, '--node_rank', n, str(script)]) for n in '01'])
    for n, text in enumerate(texts):
        assert f'composer: node {n}' in text, text
        assert re.search(WELL, text), text


STUBS = {
    # runs what follows its options once per node, at the same time, and ends with the highest exit code
    'srun': """
        while [[ $1 == --* ]]; do shift; done
        for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" & pids+=($!); done
        for pid in "${pids[@]}"; do wait "$pid"; code=$?; ((code > most)) && most=$code; done
        exit ${most:-0}""",
    'scontrol': """
        echo "$@" >> scontrol.txt
        if [[ $1 == show ]]; then printf 'host-a\\nhost-b\\n'; fi""",
    # two ranks per launcher; the exit code of the first is its own, as it is the real launcher's
    'composer': """
        export | sed 's/declare -x //' > "launcher-$NODE_RANK.env"
        printf '%s\\n' "$@" > "launcher-$NODE_RANK.args"
        trap 'touch "launcher-$NODE_RANK.signalled"' TERM
        for n in 0 1; do
            bash -c 'trap "touch rank-$0.stopped; exit 75" TERM; touch rank-$0.up
                     for i in {1..600}; do [ -e end ] && exit $(cat end); sleep 0.1; done' "$NODE_RANK-$n" &
            pids+=($!)
        done
        wait "${pids[0]}"; code=$?; wait "${pids[1]}"
        exit $code""",
}


@pytest.fixture
def slurm(tmp_path):
    """The script of the README, and a folder to run it in with commands that stand for Slurm's and Composer's."""
    blocks = re.findall(r'^```\w*\n(.*?)^```$', (ROOT / 'README.md').read_text(), re.MULTILINE | re.DOTALL)
    scripts = [block for block in blocks if '#SBATCH' in block and 'srun' in block]
    assert len(scripts) == 1, 'one script for training under Slurm in the README'
    (tmp_path / '.venv/bin').mkdir(parents=True)
    (tmp_path / '.venv/bin/activate').touch()
    (tmp_path / 'bin').mkdir()
    for name, text in STUBS.items():
        (tmp_path / 'bin' / name).write_text(f'#!/bin/bash\n{text}\n')
        (tmp_path / 'bin' / name).chmod(0o755)
    (tmp_path / 'job.sh').write_text(scripts[0])
    env = clean_env(SLURM_JOB_ID='4321987', SLURM_JOB_NAME='gpt-125m', SLURM_NNODES='2', SLURM_JOB_NODELIST='host-[a-b]')
    env['PATH'] = f'{tmp_path / "bin"}{os.pathsep}{env["PATH"]}'
    job = subprocess.Popen(['bash', 'job.sh'], cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob('rank-*.up'))) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    yield tmp_path, job
    if job.poll() is None:
        os.killpg(job.pid, signal.SIGKILL)
    job.communicate()


def test_slurm_starts_one_launcher_on_each_node(slurm):
    folder, job = slurm
    (folder / 'end').write_text('0')
    assert job.wait(60) == 0, job.stdout.read()
    for node in (0, 1):
        env = (folder / f'launcher-{node}.env').read_text()
        for part in (f'NODE_RANK="{node}"', 'WORLD_SIZE="16"', 'MASTER_ADDR="host-a"', 'MASTER_PORT="21987"'):
            assert part in env.splitlines()
        args = (folder / f'launcher-{node}.args').read_text().splitlines()
        assert args[:4] == ['-n', '8', 'main.py', 'yamls/mosaic_gpt/125m.yaml']
        assert args[4:] == ['run_name=gpt-125m', 'save_folder=checkpoints/{run_name}', 'autoresume=true']
    assert 'requeue' not in (folder / 'scontrol.txt').read_text()


def test_slurm_requeues_what_it_has_stopped_before_the_time_limit(slurm):
    folder, job = slurm
    os.kill(job.pid, signal.SIGUSR1)
    assert job.wait(60) == 75, job.stdout.read()
    assert len(list(folder.glob('rank-*.stopped'))) == 4
    assert not list(folder.glob('launcher-*.signalled'))
    assert (folder / 'scontrol.txt').read_text().splitlines()[1:] == ['requeue 4321987']
    assert not list(folder.glob('.launcher-*'))


def test_slurm_does_not_requeue_a_failure(slurm):
    folder, job = slurm
    (folder / 'end').write_text('1')
    assert job.wait(60) == 1, job.stdout.read()
    assert 'requeue' not in (folder / 'scontrol.txt').read_text()


def test_the_script_has_the_tools_that_it_names():
    assert shutil.which('pkill'), 'the script signals the ranks with it'

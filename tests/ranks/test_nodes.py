"""Several nodes: ranks connect and compare their settings, and messages name what is wrong."""

import json
import re
import socket
import sys
from pathlib import Path

import pytest
from hosts import NODE, Host, hosts, need_nodes, outputs, start
from launch import ROOT, SCRIPTS, clean_env, console, free_port, run, tiny

from src.ranks import agreement

QUICKSTART = 'yamls/quickstart.yaml'
SHORT = ('max_duration=4ba', 'eval_interval=4ba', 'scheduler.t_warmup=1ba')
HOSTNAME = socket.gethostname()


# ---------------------------------------------------------------- meeting

# Forks ranks from a process that has imported Composer once. argv[1] is JSON: it maps the name of a case to the variables
# of its ranks. Each rank connects to the others, then does its TASK.
RANKS = """
import json, os, sys, time
from src.ranks import agreement, environment, preflight, rendezvous
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
            agreement.check_ranks_agree('config', json.loads(task[1]))
        if task[0] == 'part':
            preflight.check_sum(list(agreement.gather_from_ranks(None)), float(task[1]))
        if task[0] == 'preflight':
            rendezvous.initialize(1)  # the second call does nothing
            agreement.check_ranks_agree('config', {'seed': 17})
            text = preflight.preflight()
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
def reports():
    """Runs all cases at the same time, each on its own port. Maps a case to the text and the seconds of each rank."""
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
        done = run([sys.executable, '-c', RANKS, json.dumps(cases)], cwd=ROOT, env=clean_env())
    finally:
        taken.close()
        silent.close()
    got = results(done.stdout)
    for name, ranks in got.items():
        print(name, *ranks, sep='\n    ')
    return got


SUCCESS = (rf'devices: 2 on (?:1 node: node 0 {HOSTNAME} 2|2 nodes: node 0 {HOSTNAME} 1 x CPU, node 1 {HOSTNAME} 1) x CPU\n'
        r'all-reduce: correct; 8 MiB in [\d.]+ ms, ([\d.e+]+) GB/s \(bus bandwidth ([\d.e+]+) GB/s\)')


def test_ranks_that_meet_agree_and_sum(reports):
    for text, _ in reports['well']:
        match = re.fullmatch(SUCCESS, text)
        assert match, text
        assert match[1] == match[2], 'two ranks: 2 * (2 - 1) / 2 = 1'


SAME_WORLD = 'start every node with its own NODE_RANK, and all with the same composer -n, WORLD_SIZE'
DIFFERENCES = (f'config: the nodes disagree; start every node with the same YAML, arguments and files:\n'
               f'  - new is not set on node 0 ({HOSTNAME}) and \'x\' on node 1 ({HOSTNAME})\n'
               f'  - optimizer.lr is 0.001 on node 0 ({HOSTNAME}) and 0.002 on node 1 ({HOSTNAME})')
EXPECTED = {
    'one /dev/shm': [[f'node 0 ({HOSTNAME}), node 1 ({HOSTNAME}) share one /dev/shm, and each node needs its own',
                      '(composer -n)', '--ipc=private']] * 2,
    'unreachable': [[f'{HOSTNAME} (NODE_RANK 1): cannot connect to all ranks (dist_timeout: 4 s): node 0 does not answer: [Errno 111] '
                     'Connection refused, after 4 s, with MASTER_ADDR:MASTER_PORT 127.0.0.1:', 'WORLD_SIZE 2', agreement.NETWORK_ADVICE]],
    'missing': [['2 of 3 ranks (WORLD_SIZE) joined at 127.0.0.1:', 'within dist_timeout, 4 s: node 0',
                 'missing are ranks of node 2', agreement.NETWORK_ADVICE]] * 2,
    'twins': [[f'2 processes have RANK 1, on NODE_RANK 1 ({HOSTNAME}), 1 ({HOSTNAME})', SAME_WORLD]] * 3,
    'world size': [[f'WORLD_SIZE is 2 on node 0 ({HOSTNAME}) and 4 on node 1 ({HOSTNAME})', SAME_WORLD]] * 2,
    'processes': [[f'LOCAL_WORLD_SIZE is 1 on node 0 ({HOSTNAME}) and 2 on node 1 ({HOSTNAME})', SAME_WORLD]] * 2,
    'port taken': [['MASTER_PORT: ', f'is in use on {HOSTNAME} (NODE_RANK 0)', 'set another port, on every node']],
    'another program': [[f'{HOSTNAME} (NODE_RANK 1): cannot connect to all ranks (dist_timeout: 4 s): no answer in time', agreement.NETWORK_ADVICE]],
    'agree': [[DIFFERENCES]] * 2,
    'agree in a node': [[f'a is 1 on rank 0 of node 0 ({HOSTNAME}) and 2 on rank 1 of node 0 ({HOSTNAME})']] * 2,
    'wrong part': [[f'all-reduce over 2 ranks is wrong: the part of node 1 ({HOSTNAME}) did not arrive as sent, as seen on '
                    f'node 0 ({HOSTNAME}), node 1 ({HOSTNAME})']] * 2,
}


@pytest.mark.parametrize('case', EXPECTED)
def test_ranks_that_do_not_fit_are_told_so(reports, case):
    assert len(reports[case]) == len(EXPECTED[case])
    for (text, _), parts in zip(reports[case], EXPECTED[case]):
        for part in parts:
            assert part in text


# ---------------------------------------------------------------- two hosts


@pytest.fixture(scope='module')
def two_hosts():
    with hosts() as two:
        yield two


@pytest.fixture(scope='module')
def host_reports(two_hosts):
    """Like `reports`, for cases that need two hosts with their own addresses."""
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
def test_hosts_meet_though_their_names_have_no_address(host_reports):
    """By default gloo would give the other host the address of the loopback device."""
    for text, _ in host_reports['well']:
        assert text.startswith('devices: 2 on 2 nodes: node 0 host-a 1 x CPU, node 1 host-b 1 x CPU\nall-reduce: correct; 8 MiB')


EXPECTED_ON_HOSTS = {
    'two nodes 0': ['2 processes have RANK 0, on NODE_RANK 0 (host-', SAME_WORLD],
    'no network': ['all ranks have registered, but cannot connect to each other (dist_timeout: 15 s): ', 'GLOO_SOCKET_IFNAME'],
    'no route': ['host-b (NODE_RANK 1): cannot connect to all ranks (dist_timeout: 4 s): node 0 does not answer: ', '10.231.7.9:7504'],
    'loopback': ['Connection refused', '127.0.0.1:7501', '127.0.0.1 and 0.0.0.0 are not'],
}


@pytest.mark.parametrize('case', EXPECTED_ON_HOSTS)
def test_hosts_that_do_not_fit_are_told_so(host_reports, case):
    for text, _ in host_reports[case]:
        for part in EXPECTED_ON_HOSTS[case]:
            assert part in text


def train_on(two: list[Host], mds_root: Path, by_argument: bool) -> dict[int, str]:
    """Returns the losses of the tiny model, trained on both hosts."""
    argv = ['main.py', QUICKSTART, *tiny(mds_root, *SHORT)]
    running = []
    for rank, host in enumerate(two):
        values = dict(WORLD_SIZE='2', NODE_RANK=str(rank), MASTER_ADDR=two[0].address, MASTER_PORT='7505')
        arguments = [a for name, value in values.items() for a in (f'--{name.lower()}', value)] if by_argument else []
        running.append(host.composer('-n', '1', *arguments, *argv, **({} if by_argument else values)))
    texts = outputs(running)
    assert [node.returncode for node in running] == [0, 0], '\n'.join(texts)
    assert 'each of 2 devices computes 1 microbatch of 6 samples' in texts[0] and not console(texts[1])
    return console(texts[0])['loss/train/total']


@pytest.fixture(scope='module')
def one_rank(mds_root, tmp_path_factory):
    """Returns the losses of the same run on one rank."""
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
    host = {'disks': ['/dev/shm', *([] if shared else [str(folder)])]}
    argv = ['main.py', QUICKSTART, *tiny(mds_root, *SHORT, f'save_folder={folder}', 'save_interval=4ba', 'dist_timeout=60')]
    address = ['--master_addr', '127.0.0.1', '--master_port', port, '--world_size', '2', '-n', '1']
    running = [start([str(SCRIPTS / 'composer'), *address, '--node_rank', n, *argv], host) for n in '01']
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
    script.write_text(f'import os, sys\nsys.path[0] = {str(ROOT)!r}\nfrom src.ranks import environment, preflight, rendezvous\n'
                      'environment.check_environment(os.environ)\n'
                      'rendezvous.initialize(60)\nfrom composer.utils import dist\n'
                      'print(f"composer: node {dist.get_node_rank()}")\n'
                      'print(preflight.preflight(), flush=True)\nrendezvous.leave()\n')
    address = ['--master_addr', '127.0.0.1', '--master_port', str(free_port())]
    command = [*NODE, str(SCRIPTS / 'torchrun'), '--nnodes', '2', '--nproc_per_node', '1', *address]
    texts = outputs([start([*command, '--node_rank', n, str(script)]) for n in '01'])
    for n, text in enumerate(texts):
        assert f'composer: node {n}' in text, text
        assert re.search(SUCCESS, text), text

"""Real processes and real signals: which processes stop, which survive, and what they print."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import pytest
from launch import ROOT, SCRIPTS, Popen, clean_env, free_port, run
from warm import DEFAULT_SIGTERM

from src.ranks import stop
from src.ranks.stop import StopRequest

PRELUDE = f"""
import ctypes, logging, os, signal, subprocess, sys, time
sys.path.insert(0, {str(ROOT)!r})
from src.common.workers import *
from src.ranks.failure_watch import *
from src.ranks.stop import *
logging.basicConfig(level=logging.INFO, format='%(message)s', force=True)
"""


def wait_for(condition: Callable[[], Any], seconds: float = 10) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f'not so after {seconds} s'
        time.sleep(0.02)
    return found


def is_alive(pid: int) -> bool:
    return stop._start_time(pid) is not None


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts Python scripts as processes with pipes, and ends them after the test."""
    started: list[subprocess.Popen] = []

    def start_script(script: str, *args: str, **options: Any) -> subprocess.Popen:
        path = tmp_path / f'script{len(started)}.py'
        path.write_text(PRELUDE + script)
        options = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'env': clean_env()} | options
        options['env'] = options['env'] | {DEFAULT_SIGTERM: '1'}
        started.append(Popen([sys.executable, '-u', str(path), *args], text=True, **options))
        return started[-1]

    yield start_script
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def assert_prints(process: subprocess.Popen, line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline().strip() == line


# die_with_launcher

CHILD = """
die_with_launcher()
print('ready', flush=True)
time.sleep(60)
"""
LAUNCHER = """
child = subprocess.Popen([sys.executable, sys.argv[1]], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid)
time.sleep(60)
"""


@pytest.mark.parametrize(('env', 'survives'), [({'RANK': '3', 'LOCAL_RANK': '1'}, False), ({}, True)], ids=['launched', 'plain'])
def test_a_rank_dies_with_its_launcher(start, tmp_path: Path, env: dict[str, str], survives: bool) -> None:
    child = tmp_path / 'child.py'
    child.write_text(PRELUDE + CHILD)
    launcher = start(LAUNCHER, str(child), env=clean_env(**env))
    pid = int(launcher.stdout.readline())
    launcher.kill()
    launcher.wait()
    if survives:
        time.sleep(0.5)
        assert is_alive(pid)
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not is_alive(pid), 5)


# StopRequest

WAITING = """
pids = [int(pid) for pid in sys.argv[1:]]
with StopRequest() as stop:
    stop.watch_local_ranks([os.getpid(), *pids])
    print('ready')
    while not stop.requested:
        time.sleep(0.01)
    print('requested')
    {after}
"""
STOP_LINE = 'SIGTERM: finishing the batch, then saving and stopping; send the signal again to exit now\n'


def test_one_signal_is_a_request_and_two_at_once_are_the_same(start) -> None:
    process = start(WAITING.format(after='time.sleep(1); print("saved")'))
    assert_prints(process, 'ready')
    process.send_signal(signal.SIGTERM)
    assert_prints(process, 'requested')
    process.send_signal(signal.SIGINT)  # as with Ctrl-C: from the terminal and from the launcher
    assert_prints(process, 'saved')
    assert process.wait() == 0
    assert process.stderr.read() == STOP_LINE


BLOCKED = {'blocked in C': 'c = ctypes.CDLL(None); m = ctypes.create_string_buffer(64); [c.pthread_mutex_lock(m) for _ in "12"]',
           'waiting for a lock': 'import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()'}


@pytest.mark.parametrize(('after', 'signum'), zip(BLOCKED.values(), (signal.SIGTERM, signal.SIGINT)), ids=list(BLOCKED))
def test_a_later_signal_ends_a_blocked_process_at_once(start, after: str, signum: int) -> None:
    process = start(WAITING.format(after=after))
    assert_prints(process, 'ready')
    process.send_signal(signal.SIGTERM)
    assert_prints(process, 'requested')
    time.sleep(stop.SAME_REQUEST_S + 0.1)
    assert process.poll() is None
    process.send_signal(signum)
    assert process.wait(timeout=20) == 128 + signum


@pytest.mark.parametrize('reaped', [False, True], ids=['zombie', 'reaped'])
def test_the_first_signal_after_the_death_of_a_sibling_is_no_request(start, reaped: bool) -> None:
    sibling = start('print("ready"); time.sleep(60)')
    assert_prints(sibling, 'ready')
    process = start(WAITING.format(after=''), str(sibling.pid))
    assert_prints(process, 'ready')
    sibling.kill()
    if reaped:
        sibling.wait()
    else:
        wait_for(lambda: not is_alive(sibling.pid))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 1
    assert process.stdout.read() == ''


def test_handlers_and_the_wakeup_descriptor_are_restored() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with StopRequest() as stop:
        assert signal.getsignal(signal.SIGTERM) is not before[0]
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: stop.requested)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert not stop._thread.is_alive()


# init_loader_worker

LOADER = """
import torch
from torch.utils.data import DataLoader, Dataset

class Slow(Dataset):
    def __len__(self):
        return 1000
    def __getitem__(self, i):
        time.sleep(60 if i >= 60 else 0.02)
        return i

persistent, ending = sys.argv[1] == 'persistent', sys.argv[2]
loader = DataLoader(Slow(), batch_size=2, num_workers=2, persistent_workers=persistent, worker_init_fn=init_loader_worker)
iterator = None if persistent else iter(loader)  # workers inherit the rank's handlers, or the default ones
with StopRequest() as stop:
    iterator = iterator or iter(loader)
    next(iterator), next(iterator)  # one item of each worker: both are ready
    print(*[w.pid for w in iterator._workers])
    sys.stdin.readline()
    for _ in range(19):
        next(iterator)
    print('requested' if stop.requested else 'undisturbed')
    began = time.monotonic()
    if ending == 'break':
        del iterator
        if persistent:
            loader._iterator._shutdown_workers()
        print(f'{time.monotonic() - began:.3f}')
    elif ending == 'wait':
        time.sleep(60)
    sys.stdin.readline()
"""


def loader(start, *args: str) -> tuple[subprocess.Popen, list[int]]:
    process = start(LOADER, *args, stdin=subprocess.PIPE)
    return process, [int(pid) for pid in process.stdout.readline().split()]


@pytest.mark.parametrize('persistent', ['persistent', 'fresh'])
def test_loader_workers_survive_signals_and_end_with_their_iterator(start, persistent: str) -> None:
    process, workers = loader(start, persistent, 'break')
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    time.sleep(0.2)
    print(file=process.stdin, flush=True)
    assert_prints(process, 'undisturbed')
    assert float(process.stdout.readline()) < 4  # torch gives a worker 5 s before it sends SIGTERM
    wait_for(lambda: not any(map(is_alive, workers)), 4)
    began = time.monotonic()
    print(file=process.stdin, flush=True)
    assert process.wait(timeout=20) == 0
    assert time.monotonic() - began < 4
    assert process.stderr.read() == ''


def test_loader_workers_end_with_an_interpreter_that_leaves_them_running(start) -> None:
    process, workers = loader(start, 'persistent', 'exit')
    process.stdin.write('\n\n')
    process.stdin.close()
    began = time.monotonic()
    assert process.wait(timeout=20) == 0
    assert time.monotonic() - began < 4
    assert not any(map(is_alive, workers))


def test_busy_loader_workers_die_with_a_killed_rank(start) -> None:
    process, workers = loader(start, 'fresh', 'wait')
    print(file=process.stdin, flush=True)
    assert_prints(process, 'undisturbed')
    time.sleep(0.5)  # until the workers have begun the items that take a minute
    process.kill()
    wait_for(lambda: not any(map(is_alive, workers)), 4)


# FailureWatch

RANK = """
import torch
import torch.distributed as dist
rank = int(os.environ['RANK'])
dist.init_process_group('gloo')
with StopRequest() as stop, FailureWatch(stop) as watch:
    deadline = time.monotonic() + 10
    while not stop._siblings and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        BODY
    except Exception as e:
        watch.report_crash(e)
        sys.exit(1)
    print(f'rank {rank} ends')
dist.destroy_process_group()
"""
CRASH = """dist.barrier()
        if rank == CULPRIT:
            raise ValueError('boom\\nsecond line')
        dist.barrier()""".replace('CULPRIT', '{culprit}')
KILLED = """dist.barrier()
        print('ready')
        if rank == {culprit}:
            os.kill(os.getpid(), signal.SIGKILL)
        {wait}"""
HOST = os.uname().nodename
FAILURE_CODES = (1, -signal.SIGTERM)  # SIGTERM of the launcher may reach a rank that is already exiting with 1


class Launched:
    """Starts ranks as Composer does, on nodes of these sizes. On a single node, the first failure sends SIGTERM to all."""

    def __init__(self, start: Callable, tmp_path: Path, body: str, nodes: tuple[int, ...] = (2,)):
        port, world = str(free_port()), sum(nodes)
        self.files = [tmp_path / f'rank{i}.txt' for i in range(world)]
        self.ranks = []
        self.clean_up = len(nodes) == 1
        for i, (node, local) in enumerate((node, local) for node, size in enumerate(nodes) for local in range(size)):
            env = clean_env(RANK=str(i), WORLD_SIZE=str(world), LOCAL_RANK=str(local), LOCAL_WORLD_SIZE=str(nodes[node]),
                            NODE_RANK=str(node), MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
            with self.files[i].open('w') as f:
                self.ranks.append(start(RANK.replace('BODY', body), env=env, stdout=f, stderr=f))

    def codes(self, seconds: float = 20) -> list[Optional[int]]:
        """Returns the exit codes; all ranks have to end within some seconds after the first failure."""
        deadline: Optional[float] = None
        limit = time.monotonic() + 60
        while any(r.poll() is None for r in self.ranks):
            now = time.monotonic()
            assert now < limit
            if deadline is None and any(r.poll() for r in self.ranks):
                deadline = now + seconds
                for r in self.ranks:
                    if self.clean_up and r.poll() is None:
                        r.send_signal(signal.SIGTERM)
            assert deadline is None or now < deadline, f'still running after {seconds} s: {self.texts()}'
            time.sleep(0.05)
        return [r.poll() for r in self.ranks]

    def texts(self) -> list[str]:
        return [f.read_text() for f in self.files]


@pytest.mark.parametrize('culprit', [0, 1])
def test_the_failure_of_one_rank_ends_all_and_is_shown_on_the_terminal(start, tmp_path: Path, culprit: int) -> None:
    run = Launched(start, tmp_path, CRASH.format(culprit=culprit))
    codes = run.codes(5)
    assert all(code in FAILURE_CODES for code in codes), (codes, run.texts())
    texts = run.texts()
    who = f'rank {culprit} on node 0 ({HOST})'
    line = f'{who} failed: ValueError: boom; this rank ({1 - culprit} on node 0) stops\n'
    for shown in {0, culprit}:
        assert texts[shown].startswith(f'{who}:\nTraceback (most recent call last):\n')
        assert texts[shown].count('ValueError: boom') == 1 + (shown != culprit)
    assert line in texts[1 - culprit] and line not in texts[culprit]
    assert 'losed by peer' not in ''.join(texts)


@pytest.mark.parametrize(('culprit', 'nodes', 'wait'), [
    pytest.param(0, (2,), 'dist.barrier()', id='rank 0, lost in a collective'),
    pytest.param(1, (2,), 'time.sleep(60)', id='rank 1'),
    pytest.param(1, (2,), 'dist.barrier()', id='rank 1, lost in a collective', marks=pytest.mark.slow),
    pytest.param(0, (1, 1), 'time.sleep(60)', id='rank 0, of another node'),
    pytest.param(0, (1, 1), 'dist.barrier()', id='rank 0, of another node, lost in a collective', marks=pytest.mark.slow),
    pytest.param(2, (1, 2), 'dist.barrier()', id='rank 2, of another node, lost in a collective'),
])
def test_a_killed_rank_ends_the_others(start, tmp_path: Path, culprit: int, nodes: tuple[int, ...], wait: str) -> None:
    run = Launched(start, tmp_path, KILLED.format(culprit=culprit, wait=wait), nodes)
    node_of = [node for node, size in enumerate(nodes) for _ in range(size)]
    for i, (code, text) in enumerate(zip(run.codes(8), run.texts())):
        if i == culprit:
            assert code == -signal.SIGKILL
            continue
        assert code in FAILURE_CODES
        assert f'rank {culprit} on node {node_of[culprit]} (' in text and ') failed: its process ' in text
        assert f'; this rank ({i} on node {node_of[i]}) stops\n' in text
        assert 'Traceback' not in text


@pytest.mark.parametrize('later', [0, 1])
def test_a_good_end_raises_no_alarm(start, tmp_path: Path, later: int) -> None:
    run = Launched(start, tmp_path, f'time.sleep(2.5 if rank == {later} else 0)')
    assert run.codes() == [0, 0]
    assert run.texts() == ['rank 0 ends\n', 'rank 1 ends\n']


MISTAKE = """from src.common.errors import UserError
        if rank in {ranks}:
            raise UserError('optimizer.lr: -1 is not above 0')
        time.sleep(60)"""


@pytest.mark.parametrize('ranks', [(0, 1), (1,)], ids=['all', 'one'])
def test_a_mistake_of_the_user_is_one_message(start, tmp_path: Path, ranks: tuple[int, ...]) -> None:
    shorter = 'import src.ranks.failure_watch; src.ranks.failure_watch.WAIT_FOR_RANK_0_S = 3.0\n        '
    run = Launched(start, tmp_path, shorter + MISTAKE.format(ranks=ranks))
    codes = run.codes(5)
    assert all(code in FAILURE_CODES for code in codes), (codes, run.texts())
    texts = run.texts()
    message = 'error: optimizer.lr: -1 is not above 0\n'
    assert texts[0].startswith(message if 0 in ranks else f'rank 1 on node 0 ({HOST}):\n{message}')
    assert texts[0].count(message) == 1
    assert 'Traceback' not in ''.join(texts)


@pytest.mark.slow
def test_composers_launcher_returns_soon_and_shows_the_traceback_of_a_rank_above_0(tmp_path: Path) -> None:
    script = tmp_path / 'rank.py'
    script.write_text(PRELUDE + RANK.replace('BODY', CRASH.format(culprit=1)))
    command = [str(SCRIPTS / 'composer'), '-n', '2', '--master_port', str(free_port()), str(script)]
    began = time.monotonic()
    done = run(command, env=clean_env(), timeout=100)
    assert done.returncode == 1
    assert f'rank 1 on node 0 ({HOST}):\nTraceback (most recent call last):\n' in done.stderr
    assert f'rank 1 on node 0 ({HOST}) failed: ValueError: boom; this rank (0 on node 0) stops\n' in done.stderr
    assert time.monotonic() - began < 45  # the launcher itself waits 30 s after the first exit

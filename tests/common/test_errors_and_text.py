"""Messages and settings for machines that lack something, and text in any encoding."""

import ast
import faulthandler
import getpass
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import ROOT

from src.callbacks import loggers
from src.common import machine
from src.config import load as config
from src.config.check import check
from src.ranks.environment import this_process
from src.ranks.failure_board import Failure
from src.training import failures, plugins

LOST = {
    'DataLoader worker (pid 7) is killed by signal: Bus error. It is possible': 'its workers found no room in /dev/shm',
    'Caught RuntimeError: unable to write to file </torch_7_0_0>: No space left on device (28)': 'no room in /dev/shm',
    'DataLoader worker (pid 7) is killed by signal: Killed. ': 'killed (SIGKILL), most likely by the system',
    'unable to open shared memory object </torch_7>: Too many open files (24)': 'raise the limit (ulimit -n 65536)',
    'received 0 items of ancdata': 'raise the limit (ulimit -n 65536), or set a smaller eval_loader.num_workers',
}


@pytest.mark.parametrize('text', LOST)
def test_what_ends_a_loader_worker_is_explained(text):
    error = RuntimeError('DataLoader worker (pid(s) 7) exited unexpectedly')
    error.__cause__ = RuntimeError(text)
    said = machine.explain_lost_worker(error, 'eval_loader')
    assert said and said.startswith('eval_loader: ') and LOST[text] in said


def test_other_errors_of_loaders_stay_as_they_are(monkeypatch):
    lost = RuntimeError('DataLoader worker (pid(s) 7) exited unexpectedly')
    assert machine.explain_lost_worker(lost, 'train_loader') is None
    assert machine.explain_lost_worker(RuntimeError('shape mismatch'), 'train_loader') is None
    monkeypatch.setattr(machine, 'free_shared_memory', lambda: 1 << 20)
    assert 'train_loader: a loader worker has ended; /dev/shm (shared memory) is full, 1.0 MB are free' in str(
        machine.explain_lost_worker(lost, 'train_loader'))


def test_the_death_of_a_rank_says_that_shared_memory_is_full(monkeypatch):
    assert Failure.by_death(this_process(), 0).summary == 'its process died'
    monkeypatch.setattr(machine, 'free_shared_memory', lambda: 0)
    assert Failure.by_death(this_process(), 0).summary.startswith('its process died; /dev/shm (shared memory) is full')


def test_memory_without_a_limit_is_not_full(monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: (0, 0, 0))
    machine.check_shared_memory(1, 'a run')
    assert machine.low_shared_memory_hint() == ''


def test_a_user_without_a_name_and_a_home_has_both(monkeypatch):
    for name in ('USER', 'LOGNAME', 'LNAME', 'USERNAME', 'HOME'):
        monkeypatch.setenv(name, 'someone')
        machine.prepare_environment()
        assert os.environ[name] == 'someone', 'what is known stays'
    for name in ('USER', 'LOGNAME', 'LNAME', 'USERNAME', 'HOME'):
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, 'getuid', lambda: 987654)  # no such user: `pwd` raises a KeyError
    machine.prepare_environment()
    assert getpass.getuser() == 'user-987654'
    assert Path.home() == Path(tempfile.gettempdir(), 'home-of-user-987654') and os.access(Path.home(), os.W_OK)


def test_torch_starts_no_processes_for_later_where_shared_memory_is_full(monkeypatch):
    monkeypatch.delenv('TORCH_WARM_POOL', raising=False)
    machine.prepare_environment()
    assert 'TORCH_WARM_POOL' not in os.environ
    monkeypatch.setattr(machine, 'free_shared_memory', lambda: 0)
    monkeypatch.setenv('TORCH_WARM_POOL', '1')
    machine.prepare_environment()
    assert os.environ['TORCH_WARM_POOL'] == '1', 'what is set stays'
    monkeypatch.delenv('TORCH_WARM_POOL')
    machine.prepare_environment()
    assert os.environ.pop('TORCH_WARM_POOL') == '0'


def test_every_text_file_is_read_and_written_as_utf8():
    """Without an explicit encoding, a locale such as LC_ALL=de_DE.ISO-8859-1 would decide."""
    known = ('utf-8', 'os.open(', "'rb'", "'r+b'", "'wb'", "'ab'", '/proc/', 'maps.read_text')
    for path in [ROOT / 'main.py', ROOT / 'convert_c4.py', *ROOT.glob('src/**/*.py')]:
        for call in ast.walk(ast.parse(path.read_text('utf-8'))):
            name = ast.unparse(call.func).split('.')[-1] if isinstance(call, ast.Call) else ''
            if name in ('read_text', 'write_text', 'open'):
                assert any(word in ast.unparse(call) for word in known), f'{path}: {ast.unparse(call)}: encoding?'


def test_any_text_is_printed_in_any_encoding(tmp_path, monkeypatch):
    with open(tmp_path / 'output', 'w', encoding='ascii') as file:
        monkeypatch.setattr(sys, 'stdout', file)
        monkeypatch.setattr(sys, 'stderr', file)
        monkeypatch.setattr(faulthandler, 'enable', lambda: print('signals are reported'))
        machine.set_up_output()
        print('naïve', os.fsdecode(b'\xff.mds'))
    assert (tmp_path / 'output').read_text('ascii') == 'signals are reported\nna\\xefve \\udcff.mds\n'


def test_the_file_logger_writes_utf8_in_any_locale(mds_root, tmp_path, monkeypatch):
    opened = open

    def in_ascii(file: Any, mode: str = 'r', buffering: int = -1, encoding: Any = 'ascii', **kwargs: Any) -> Any:
        return opened(file, mode, buffering, None if 'b' in mode else encoding, **kwargs)

    from composer.loggers import file_logger
    monkeypatch.setattr(file_logger, 'open', in_ascii, raising=False)
    run = loggers.FileLogger(filename=str(tmp_path / 'log.txt'), capture_stdout=False, capture_stderr=False)
    run.log_hyperparameters({'before': 'naïve'})
    state: Any = type('State', (), {'run_name': 'r'})()
    run.init(state, None)  # pyright: ignore[reportArgumentType]
    run.log_hyperparameters({'after': '漢字'})
    assert run.file is not None
    run.file.close()
    text = (tmp_path / 'log.txt').read_text('utf-8')
    assert '[hyperparameter]: before: "naïve"\n' in text and '[hyperparameter]: after: "漢字"\n' in text


def test_an_out_of_memory_on_one_of_several_gpus_advises_the_launcher_first(monkeypatch):
    c = check(config.load([str(ROOT / 'yamls/quickstart.yaml')]), plugins.REGISTRIES, 1, False)
    first = [str(failures.out_of_memory_error(c, MemoryError())).split('  1. ')[1]]
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 8)
    first.append(str(failures.out_of_memory_error(c, MemoryError())).split('  1. ')[1])
    launch = 'start with `composer main.py ...`, which uses all 8 GPUs of this machine; this run uses 1'
    assert first[1].splitlines()[0] == launch and first[1].splitlines()[1] == f'  2. {first[0].splitlines()[0]}'
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '8')
    assert 'composer' not in str(failures.out_of_memory_error(c, MemoryError()))

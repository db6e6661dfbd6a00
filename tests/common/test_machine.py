"""Runs on a machine with little shared memory, disks that cannot be written, a long TMPDIR, another `src`."""

import errno
import multiprocessing.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest
from conftest import orphans
from hosts import need_nodes
from launch import ROOT, clean_env
from streaming import MDSWriter
from streaming.base import stream as streaming_stream
from torch.utils.data import DataLoader, Dataset

from src.common import machine, storage
from src.common.errors import UserError
from src.common.workers import init_loader_worker
from src.data_c4 import StreamingC4, build_c4_dataloader
from src.loader import shared_memory

# ---------------------------------------------------------------- shared memory


def loader(root: Path, num_workers: int = 0, evaluate: bool = False, split: str = 'train') -> DataLoader:
    """Builds a loader with batches of 10 sequences of 32 tokens."""
    cfg = {'local': str(root), 'split': split, 'max_seq_len': 32, 'tokenizer_name': str(root / 'tokenizer'),
           'num_canonical_nodes': 1}
    return build_c4_dataloader({'dataset': cfg, 'num_workers': num_workers, 'eval_samples': -1}, 10, evaluate)


@pytest.fixture
def no_other_loaders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, '_needed_bytes', WeakKeyDictionary())


def test_a_loader_is_refused_that_does_not_fit_into_shared_memory(tokens_root, monkeypatch, no_other_loaders):
    # 2 workers prepare 2 batches each, of 2 tensors of 10 x 32 x 8 bytes, in pages; 500 samples take 8 bytes each
    need = 2 * 2 * 2 * 4096 + 8 * 500
    monkeypatch.setattr(machine, 'free_shared_memory', lambda: need)
    train = loader(tokens_root, 2)
    with pytest.raises(UserError) as e:
        loader(tokens_root, 1, evaluate=True, split='val')  # the 2 batches of its worker do not fit beside those of `train`
    assert str(e.value).startswith(
        f'/dev/shm (shared memory) has {need:,} bytes free, and the batches of loader workers (eval_loader: 2 of 8,192 '
        f'bytes) and the order of the samples take {need + 2 * 2 * 4096:,} bytes there; start the container with '
        'docker run --shm-size=16g or --ipc=host')
    assert str(e.value).endswith('or set a smaller eval_loader.num_workers')
    del train
    loader(tokens_root, 1, evaluate=True, split='val')
    monkeypatch.setattr(machine, 'free_shared_memory', lambda: 3999)
    with pytest.raises(UserError, match='take 4,000 bytes there'):  # the order of the samples alone
        loader(tokens_root)
    monkeypatch.setattr(machine, 'free_shared_memory', lambda: 4000)
    loader(tokens_root)


def test_a_dataset_in_full_shared_memory_is_a_message(tokens_root, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, 'No space left on device')

    before = orphans()
    with monkeypatch.context() as patch:
        patch.setattr(os, 'posix_fallocate', full)
        patch.setattr(machine, 'free_shared_memory', lambda: 0)
        with pytest.raises(UserError, match="has 0 bytes free, and the loader's state and the order of the samples take"):
            StreamingC4(str(tokens_root / 'tokenizer'), 32, local=str(tokens_root), split='train')
    assert orphans() <= before
    assert StreamingC4(str(tokens_root / 'tokenizer'), 32, local=str(tokens_root), split='train').size == 500


# Fills shared memory and mounts a folder read-only. argv: a folder of tokens, and one with zstd shards
SMALL_MACHINE = """
import os, subprocess, sys
os.environ['TORCH_WARM_POOL'] = '0'
from pathlib import Path
from src.common import machine
from src.common.errors import UserError
from src.data_c4 import StreamingC4, build_c4_dataloader

tokens, packed = sys.argv[1:]
def build(num_workers=0, root=tokens, batch_size=10, **dataset):
    cfg = {'local': root, 'split': 'train', 'max_seq_len': 32, 'tokenizer_name': tokens + '/tokenizer',
           'num_canonical_nodes': 1, **dataset}
    return build_c4_dataloader({'dataset': cfg, 'num_workers': num_workers}, batch_size)
def said(name, call):
    try:
        print(f'{name}: {call()} batches')
    except UserError as e:
        print(f'{name}: {e}')

fill = Path('/dev/shm/another_job')
subprocess.run(['dd', 'if=/dev/zero', f'of={fill}', 'bs=1M'], capture_output=True)
said('open', lambda: len(list(build())))
fill.unlink()
said('refused', lambda: len(list(build(batch_size=500, num_workers=9))))
streams_of_batches = build(batch_size=500, num_workers=1)
with fill.open('wb') as f:
    f.truncate(machine.free_shared_memory() - (40 << 10))
    os.posix_fallocate(f.fileno(), 0, machine.free_shared_memory() - (40 << 10))
said('filled', lambda: len(list(streams_of_batches)))
fill.unlink()
subprocess.run(['mount', '--bind', packed, packed], check=True)
subprocess.run(['mount', '-o', 'remount,bind,ro', packed, packed], check=True)
said('in place', lambda: len(list(build(root=packed))))
said('copied to it', lambda: len(list(build(remote=tokens, root=packed + '/copy'))))
said('copied', lambda: len(list(build(remote=packed, root=packed + '-copy'))))
"""


@pytest.fixture
def packed(tokens_root: Path, tmp_path: Path) -> Path:
    """A folder with the first 40 sequences of `tokens_root`, compressed, in several shards."""
    source = StreamingC4(str(tokens_root / 'tokenizer'), 32, local=str(tokens_root), split='train')
    with MDSWriter(out=str(tmp_path / 'packed/train'), columns={'tokens': 'ndarray:uint16'}, size_limit=1 << 10,
                   compression='zstd') as out:
        for i in range(40):
            out.write(source[i])
    shutil.copytree(tokens_root / 'tokenizer', tmp_path / 'packed/tokenizer')
    return tmp_path / 'packed'


@pytest.mark.slow
def test_full_shared_memory_and_disks_that_cannot_be_written_are_messages(tokens_root, packed, tmp_path):
    need_nodes()
    command = ['unshare', '--mount', '--map-root-user', 'sh', '-c',
               'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', 'sh', sys.executable, '-c', SMALL_MACHINE]
    done = subprocess.run([*command, str(tokens_root), str(packed)], cwd=ROOT, env=clean_env(), text=True,
                          capture_output=True)
    said = dict(line.split(': ', 1) for line in done.stdout.splitlines() if ': ' in line)
    assert done.returncode == 0, done.stdout + done.stderr
    assert said['open'].startswith("/dev/shm (shared memory) has 0 bytes free, and the loader's state and the order of the")
    assert said['refused'].startswith('/dev/shm (shared memory) has ')
    assert 'train_loader: 18 of 0.3 MB' in said['refused']
    assert said['filled'].startswith('train_loader: its workers found no room in /dev/shm') \
        and said['filled'].endswith('set train_loader.num_workers=0')
    assert said['in place'].startswith(f'dataset.local: {packed}/train holds compressed shards') \
        and f'{packed}/train cannot be written. Set data_local to a folder on a disk of this' in said['in place']
    assert f'cannot be copied to {packed}/copy: {packed} cannot be written' in said['copied to it']
    assert said['copied'] == '4 batches'


class Unsendable(Dataset):
    """Samples that cannot be pickled."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return lambda: index


def test_a_worker_that_cannot_send_its_batch_ends(capfd):
    """Otherwise the rank would wait for that batch for ever."""
    batches = DataLoader(Unsendable(), num_workers=1, worker_init_fn=init_loader_worker, timeout=60,
                         collate_fn=lambda samples: samples)
    with pytest.raises(RuntimeError, match='exited unexpectedly'):
        next(iter(batches))
    assert 'pickle' in capfd.readouterr().err


# ---------------------------------------------------------------- compressed shards that several jobs read in place


def test_two_jobs_unpack_one_shard_in_place(packed, monkeypatch):
    def dataset() -> StreamingC4:
        return StreamingC4(str(packed / 'tokenizer'), 32, local=str(packed), split='train')

    rename, raw = os.rename, packed / 'train/shard.00000.mds'
    first, second, renamed = dataset(), dataset(), []

    def rename_late(source: str, target: str) -> None:
        if not renamed:
            renamed.append(source)
            second[0]  # the other job unpacks the whole shard before this one renames its file
        rename(source, target)

    monkeypatch.setattr(streaming_stream.os, 'rename', rename_late)
    assert (first[0]['tokens'] == second[0]['tokens']).all() and raw.is_file() and renamed
    assert not list(packed.rglob('*.part*')) and not list(packed.rglob('*.tmp'))


def test_what_a_killed_job_was_unpacking_in_place_is_removed(packed):
    dead, ours, elsewhere = (packed / f'train/shard.00000.mds.part-{name}-{"0" * 8}.tmp' for name in
                             (f'{storage.HOST}-{1 << 30}', f'{storage.HOST}-{os.getpid()}', f'another-{storage.HOST}-7'))
    for path in (dead, ours, elsewhere):
        path.touch()
    loader(packed)
    assert [path.exists() for path in (dead, ours, elsewhere)] == [False, True, True]


# ---------------------------------------------------------------- folders and the user


@pytest.fixture
def long_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Sets a TMPDIR with a path that is too long; yields the folder that the kit may use instead."""
    folder = tmp_path / ('x' * 60) / ('y' * 40)
    folder.mkdir(parents=True)
    instead = tempfile.mkdtemp(dir='/tmp')
    monkeypatch.setattr(machine, 'SOCKETS', instead)
    monkeypatch.setattr(tempfile, 'tempdir', str(folder))
    monkeypatch.setattr(multiprocessing.util, 'Finalize', lambda *args, **kwargs: None)
    settings = multiprocessing.current_process()._config  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.delitem(settings, 'tempdir', raising=False)
    yield instead
    settings.pop('tempdir', None)
    shutil.rmtree(instead)


def test_loader_workers_hand_over_batches_under_a_long_tmpdir(tokens_root, long_tmpdir):
    tmpdir = tempfile.tempdir
    batches = [batch['input_ids'].tolist() for batch in loader(tokens_root, 1)]
    assert batches == [batch['input_ids'].tolist() for batch in loader(tokens_root)] and len(batches) == 50
    assert os.listdir(long_tmpdir) and tempfile.tempdir == tmpdir, 'only the sockets are elsewhere'


def test_a_tmpdir_that_is_too_long_is_refused_where_nothing_else_can_be_used(tokens_root, long_tmpdir, monkeypatch):
    monkeypatch.setattr(machine, 'SOCKETS', '/no/such/folder')
    with pytest.raises(UserError, match=r'TMPDIR: .* has \d+ bytes, but the sockets of loader workers allow only 75; /no/'
                                        r'such/folder cannot be used instead \(No such file or directory\). Set TMPDIR'):
        loader(tokens_root, 1)
    loader(tokens_root, 0)


# ---------------------------------------------------------------- text, and other packages


def test_another_package_called_src_is_not_taken(tmp_path):
    (tmp_path / 'src').mkdir()
    (tmp_path / 'src/__init__.py').write_text('raise SystemExit("the other src")')
    env = clean_env(PYTHONPATH=str(tmp_path), PYTHONSAFEPATH='1')
    programs = {'convert_c4.py': 'one of the arguments --out_root --verify is required', 'main.py': 'no-such.yaml: no such file.'}
    started = {program: subprocess.Popen([sys.executable, str(ROOT / program), 'no-such.yaml'], cwd=tmp_path, env=env,
                                         stderr=subprocess.PIPE, text=True) for program in programs}
    said = {program: process.communicate()[1] for program, process in started.items()}
    for program, message in programs.items():
        assert message in said[program], said[program]

"""Fetching and checking shards, several streams in one dataset, and a cache that is smaller than the data."""

import errno
import json
import os
import re
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
from conftest import write_mds
from launch import ROOT, Popen, clean_env, free_port, tiny
from streaming import MDSWriter
from streaming.base.batching import generate_work
from streaming.base.storage.download import LocalDownloader
from streaming.base.world import World
from torch.utils.data import DistributedSampler

import main
from src.common.errors import UserError
from src.config import load as config
from src.config.check import check as check_config
from src.config.data_places import is_url
from src.data_c4 import EvalView, StreamingC4, build_c4_dataloader
from src.training import plugins

SHARD = 'shard.00003.mds'
SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('src.loader.fetching.BACKOFF_S', 0.01)


@pytest.fixture
def data(tokens_root: Path, tmp_path: Path) -> Path:
    """A copy of `tokens_root` that a test may damage."""
    shutil.copytree(tokens_root, tmp_path / 'data')
    return tmp_path / 'data'


@pytest.fixture
def build(data: Path, tmp_path: Path):
    """Loaders of the 500 sequences of `data`'s split `train`, in 10 shards, through copies in `tmp_path/copy`."""
    def build_loader(num_workers: int = 0, batch_size: int = 10, evaluate: bool = False, **dataset: Any):
        cfg = {'remote': str(data), 'local': str(tmp_path / 'copy'), 'split': 'train', 'max_seq_len': 32,
               'tokenizer_name': str(data / 'tokenizer'), 'num_canonical_nodes': 1, **dataset}
        return build_c4_dataloader({'dataset': cfg, 'num_workers': num_workers, 'eval_samples': -1}, batch_size, evaluate)
    return build_loader


def rows(loader: Any) -> list[list[int]]:
    return [row for batch in loader for row in batch['input_ids'].tolist()]


@pytest.fixture
def whole(tokens_root: Path) -> list[list[int]]:
    return rows(build_c4_dataloader({'dataset': {
        'local': str(tokens_root), 'split': 'train', 'max_seq_len': 32, 'tokenizer_name': str(tokens_root / 'tokenizer'),
        'num_canonical_nodes': 1}}, 10))


def damage(path: Path, how: str) -> None:
    body = bytearray(path.read_bytes())
    if how == 'missing':
        path.unlink()
    elif how == 'truncated':
        path.write_bytes(body[:len(body) // 2])
    elif how == 'empty':
        path.write_bytes(b'')
    else:
        body[-1] ^= 1
        path.write_bytes(body)


def with_hashes(root: Path, hashes: list[str], compression: Optional[str] = None) -> Path:
    """Writes the split `train` again, with hashes in its index."""
    original = StreamingC4(str(root / 'tokenizer'), 32, local=str(root), split='train')
    stored = [original[i] for i in range(original.size)]
    shutil.rmtree(root / 'train')
    with MDSWriter(out=str(root / 'train'), columns={'tokens': 'ndarray:uint16'}, size_limit=1 << 12, hashes=hashes,
                   compression=compression) as out:
        for row in stored:
            out.write(row)
    return root


# ---------------------------------------------------------------- damaged and missing shards


SAYS = {'missing': 'it is missing', 'truncated': r'it has [\d,]+ bytes, but the index says [\d,]+',
        'empty': r'it has 0 bytes, but the index says [\d,]+',
        'damaged': 'its xxh64 is [0-9a-f]{16}, but the index says [0-9a-f]{16}'}


@pytest.mark.parametrize('how', SAYS)
@pytest.mark.parametrize(('num_workers', 'evaluate'), [
    (0, False), (0, True), pytest.param(2, False, marks=SLOW), pytest.param(2, True, marks=SLOW)])
def test_a_shard_that_stays_damaged_ends_the_run(build, data: Path, tmp_path: Path, how: str, num_workers: int, evaluate: bool):
    with_hashes(data, ['sha1', 'xxh64'])
    damage(data / 'train' / SHARD, how)
    with pytest.raises(UserError) as e:
        rows(build(num_workers, evaluate=evaluate))
    assert re.fullmatch(f'dataset.remote: {SHARD} of {data}/train could not be fetched in 3 attempts: {SAYS[how]}. '
                        'Check that the data there is complete', str(e.value)), str(e.value)
    assert e.value.__context__ is None
    assert not list((tmp_path / 'copy' / 'train').glob(f'{SHARD}*'))  # other shards may still be in transfer


@pytest.mark.parametrize('how', SAYS)
@pytest.mark.parametrize('num_workers', [0, pytest.param(2, marks=SLOW)])
def test_a_shard_that_arrives_damaged_is_fetched_again(build, data: Path, whole, monkeypatch, tmp_path: Path, how: str,
                                                       num_workers: int):
    with_hashes(data, ['xxh64'])
    fetch = LocalDownloader._download_file_impl

    def flaky(self: Any, remote: str, local: str, timeout: float) -> None:
        seen = tmp_path / f'{Path(remote).name}.seen'  # in workers, too
        fetch(self, remote, local, timeout)
        if not seen.exists():
            seen.touch()
            damage(Path(local), how)

    monkeypatch.setattr(LocalDownloader, '_download_file_impl', flaky)
    assert rows(build(num_workers)) == whole
    assert len(list(tmp_path.glob('*.seen'))) == 11, 'every shard and the index were damaged once'


@pytest.mark.parametrize('how', SAYS)
def test_a_damaged_copy_of_an_earlier_run_is_repaired(build, data: Path, whole, tmp_path: Path, how: str):
    with_hashes(data, ['xxh64'])
    shutil.copytree(data / 'train', tmp_path / 'copy' / 'train')
    damage(tmp_path / 'copy' / 'train' / SHARD, how)
    (tmp_path / 'copy' / 'train' / f'{SHARD}.part.x1').write_text('of a killed run')
    (tmp_path / 'copy' / 'train' / 'my.parts').write_text('of somebody else')
    assert rows(build(validate_hash='xxh64')) == whole
    assert (tmp_path / 'copy' / 'train' / SHARD).read_bytes() == (data / 'train' / SHARD).read_bytes()
    assert [path.name for path in (tmp_path / 'copy').rglob('*.part*')] == ['my.parts']


@pytest.mark.parametrize('how', SAYS)
def test_data_that_is_read_in_place_is_checked_at_the_start(build, data: Path, how: str):
    with_hashes(data, ['xxh64'])
    damage(data / 'train' / SHARD, how)
    before = {path: path.stat().st_size for path in data.rglob('*')}
    with pytest.raises(UserError, match=f'dataset: shard {SHARD} of {data}/train is damaged: {SAYS[how]}. Damaged or '
                                        'missing: 1 of 10 shards; copy them again. Make it with\n  python convert_c4.py'):
        build(remote=None, local=str(data), validate_hash='xxh64')
    assert {path: path.stat().st_size for path in data.rglob('*')} == before


def test_a_shard_that_vanishes_in_place(build, data: Path):
    loader = build(remote=None, local=str(data))
    (data / 'train' / SHARD).unlink()
    with pytest.raises(UserError, match=f'dataset: {SHARD} of {data}/train is missing'):
        rows(loader)


def test_a_linked_split_is_read_in_place(build, data: Path, whole, tmp_path: Path):
    with_hashes(data, ['xxh64'], 'zstd')
    (tmp_path / 'copy').mkdir()
    (tmp_path / 'copy' / 'train').symlink_to(data / 'train')
    before = {path.name: path.read_bytes() for path in (data / 'train').iterdir()}
    assert rows(build()) == whole
    assert rows(build(evaluate=True)) and not (tmp_path / 'copy' / 'eval').exists()
    after = {path.name: path.read_bytes() for path in (data / 'train').iterdir()}
    assert before.items() <= after.items()
    with pytest.raises(UserError, match='dataset.cache_limit: .* would delete the only copy'):
        build(cache_limit='1gb')
    damage(data / 'train' / SHARD, 'truncated')
    with pytest.raises(UserError, match=f'shard {SHARD} of .*copy/train is damaged'):
        build()
    assert (data / 'train' / SHARD).exists()


def test_copies_do_not_lie_among_the_originals(build, data: Path, tmp_path: Path):
    with pytest.raises(UserError, match=f'dataset.local: {data}/train/train lies in {data}/train, a split of the '
                                        f'remote {data}. A run deletes copies, .*; set data_local to a separate folder'):
        build(local=str(data / 'train'))
    assert not (data / 'train' / 'train').exists()
    assert build(local=str(data / 'copies'))
    part, copy = data / 'train' / '00000', tmp_path / 'copy' / 'train'
    part.mkdir()
    copy.mkdir(parents=True)
    (copy / '00000').symlink_to(part)
    with pytest.raises(UserError, match=f'dataset.local: {copy}/00000 is a link to a folder of the remote {data}. A run'):
        build()
    (copy / '00000').unlink()
    (tmp_path / 'disk').mkdir()
    (copy / '00000').symlink_to(tmp_path / 'disk')
    assert build()


@pytest.mark.parametrize('keep_zip', [False, pytest.param(True, marks=SLOW)])
@pytest.mark.parametrize('num_workers', [0, pytest.param(2, marks=SLOW)])
def test_compressed_shards(build, data: Path, whole, tmp_path: Path, keep_zip: bool, num_workers: int):
    with_hashes(data, ['xxh64'], 'zstd')
    assert rows(build(num_workers, keep_zip=keep_zip)) == whole
    assert len(list((tmp_path / 'copy' / 'train').glob('*.zstd'))) == 10 * keep_zip
    damage(tmp_path / 'copy' / 'train' / SHARD, 'truncated')
    assert rows(build(num_workers, keep_zip=keep_zip)) == whole
    # Copies without their zip files, read in place
    for path in (tmp_path / 'copy' / 'train').glob('*.zstd'):
        path.unlink()
    assert rows(build(remote=None, local=str(tmp_path / 'copy'))) == whole
    damage(data / 'train' / f'{SHARD}.zstd', 'damaged')
    shutil.rmtree(tmp_path / 'copy')
    with pytest.raises(UserError, match=f'{SHARD}.zstd of .* could not be fetched in 3 attempts: its xxh64 is'):
        rows(build(num_workers, keep_zip=keep_zip))


def test_a_zip_that_arrives_damaged_is_fetched_again(build, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with_hashes(data, [], 'zstd')
    whole, download, fetched = rows(build()), LocalDownloader.download, []
    shutil.rmtree(tmp_path / 'copy')

    def damaging(self: LocalDownloader, remote: str, local: str, *args: Any) -> None:
        download(self, remote, local, *args)
        fetched.append(remote)
        if remote.endswith('.zstd') and fetched.count(remote) == 1:
            Path(local).write_bytes(b'x' * Path(local).stat().st_size)

    monkeypatch.setattr(LocalDownloader, 'download', damaging)
    assert rows(build()) == whole
    assert max(map(fetched.count, fetched)) == 2


def test_a_zip_that_cannot_be_unpacked(build, data: Path, tmp_path: Path):
    with_hashes(data, [], 'zstd')
    path = data / 'train' / f'{SHARD}.zstd'
    path.write_bytes(b'x' * path.stat().st_size)
    with pytest.raises(UserError, match=f'dataset.local: {tmp_path}/copy/train/{SHARD}.zstd, of {data}/train, cannot be '
                                        r'unpacked: \w*Error: .*\. Make room on its disk, or repair the shard'):
        rows(build())


@pytest.mark.parametrize('num_workers', [0, 2])
def test_a_full_disk(build, data: Path, tmp_path: Path, monkeypatch, num_workers: int):
    def fill(self: Any, remote: str, local: str, timeout: float) -> None:
        if SHARD in remote:
            Path(local + '.tmp').write_bytes(b'half')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), local)
        fetch(self, remote, local, timeout)

    fetch = LocalDownloader._download_file_impl
    monkeypatch.setattr(LocalDownloader, '_download_file_impl', fill)
    with pytest.raises(UserError, match=rf'^dataset.local: the disk of {tmp_path}/copy/train is full \([\d,]+ bytes free\): no '
                                        rf'space for {SHARD} of {data}/train \([\d,]+ bytes\); make room, set cache_limit, or '
                                        'choose a data_local on another disk$'):
        rows(build(num_workers))
    assert not list((tmp_path / 'copy').rglob(f'{SHARD}.part*'))  # a thread may still fetch another shard


def test_an_index_that_is_cut_off(build, data: Path, tmp_path: Path):
    index = data / 'train' / 'index.json'
    index.write_bytes(index.read_bytes()[:-9])
    with pytest.raises(UserError, match='dataset.remote: index.json of .* could not be fetched in 3 attempts: it is '
                                        'not complete JSON'):
        build()


def test_a_hash_that_the_index_does_not_have(build, data: Path, tmp_path: Path):
    with pytest.raises(UserError, match="dataset.validate_hash: 'sha1', but the index of .* has hashes of no kind; set one"):
        build(validate_hash='sha1')
    shutil.rmtree(tmp_path / 'copy')
    with_hashes(data, ['md5', 'xxh64'])
    with pytest.raises(UserError, match="dataset.validate_hash: 'sha1', but the index of .* has hashes of md5, xxh64; set one"):
        build(validate_hash='sha1')


@pytest.mark.parametrize('num_workers', [0, 1])
def test_the_run_ends_in_one_message(data: Path, tmp_path: Path, capfd, num_workers: int):
    damage(data / 'train' / SHARD, 'truncated')
    argv = tiny(data, f'data_local={tmp_path}/copy', f'tokenizer_name={data}/tokenizer', 'max_duration=1ep', 'eval_loader=null',
                'scheduler.t_warmup=0.1dur', f'train_loader.num_workers={num_workers}', 'eval_samples=-1')
    argv += ['train_loader.prefetch_factor=null', 'train_loader.persistent_workers=false']
    assert main.cli([str(ROOT / 'yamls' / 'quickstart.yaml'), *argv]) == 1
    err = capfd.readouterr().err
    assert 'Traceback' not in err and 'Exception' not in err, err
    last = [line for line in err.splitlines() if line.strip()][-1]
    assert last.startswith(f'error: dataset.remote: {SHARD} of {data}/train could not be fetched in 3 attempts: it has '), err


# ---------------------------------------------------------------- S3


class Server:
    """An S3 server on this machine. `how` says how it spoils the first answer for each object; '': not at all."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server
        self.app, self.how, self.seen = DomainDispatcherApplication(create_backend_app), '', set()
        self.server = make_server('127.0.0.1', 0, self._answer, threaded=True)
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def _answer(self, environ: dict, start_response: Any) -> Any:
        path = environ['PATH_INFO']
        if not self.how or environ['REQUEST_METHOD'] != 'GET' or not path.endswith(('.mds', '.json')) or path in self.seen:
            return self.app(environ, start_response)
        self.seen.add(path)
        got: list[Any] = []
        body = b''.join(self.app(environ, lambda status, headers, *_: got.extend((status, headers))))
        status, headers = got
        if self.how == 'withheld':
            status, body = '503 Service Unavailable', b''
        elif self.how == 'short':
            body = body[:len(body) // 2]
        elif self.how == 'damaged':
            body = body[:-1] + bytes([body[-1] ^ 1])
        length = len(body) + (100 if self.how == 'cut off' else 0)  # a connection that ends too early
        start_response(status, [(k, v) for k, v in headers if k.lower() not in ('content-length', 'etag')
                                and not k.lower().startswith('x-amz-checksum')] + [('Content-Length', str(length))])
        return [body]

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def s3(monkeypatch, data: Path) -> Iterator[Server]:
    """A server that has `data`, with hashes in the index, at s3://bucket/data."""
    import boto3

    with_hashes(data, ['sha1'])
    for key, value in (('AWS_ACCESS_KEY_ID', 'none'), ('AWS_SECRET_ACCESS_KEY', 'none'), ('AWS_DEFAULT_REGION', 'us-east-1')):
        monkeypatch.setenv(key, value)
    server = Server()
    monkeypatch.setenv('S3_ENDPOINT_URL', server.url)
    client = boto3.client('s3', endpoint_url=server.url)
    client.create_bucket(Bucket='bucket')
    for path in (data / 'train').iterdir():
        client.upload_file(str(path), 'bucket', f'data/train/{path.name}')
    yield server
    server.how = ''
    for item in client.list_objects_v2(Bucket='bucket').get('Contents', []):
        client.delete_object(Bucket='bucket', Key=item['Key'])
    client.delete_bucket(Bucket='bucket')  # the next server in this process would still have it
    server.stop()


@pytest.mark.parametrize('how', ['', 'damaged', *(pytest.param(how, marks=SLOW) for how in ('short', 'cut off', 'withheld'))])
@pytest.mark.parametrize('num_workers', [pytest.param(0, marks=SLOW), 2])
def test_batches_from_s3_are_those_of_the_folder(build, s3: Server, data: Path, how: str, num_workers: int):
    s3.how = how
    order = {'shuffle': True, 'num_canonical_nodes': 2}
    loaders = [build(num_workers, remote='s3://bucket/data', **order), build(0, remote=None, local=str(data), **order)]
    for _ in range(2):
        assert rows(loaders[0]) == rows(loaders[1])
    assert len(s3.seen) == (11 if how else 0)


@pytest.mark.parametrize('num_workers', [0, 2])
def test_an_object_that_is_not_there(build, s3: Server, num_workers: int):
    import boto3
    boto3.client('s3', endpoint_url=s3.url).delete_object(Bucket='bucket', Key=f'data/train/{SHARD}')
    with pytest.raises(UserError, match=f'^dataset.remote: {SHARD} of s3://bucket/data/train could not be fetched in 2 attempts: '
                                        '.*[nN]ot [fF]ound.*. Check the address, the network and the credentials, and that') as e:
        rows(build(num_workers, remote='s3://bucket/data', download_retry=1))
    assert 'Traceback' not in str(e.value)


@pytest.mark.parametrize(('remote', 'url'), [
    ('s3://b/c', True), ('gs://b/c', True), ('hf://datasets/o/r', True), ('dbfs:/Volumes/a/b', True), ('azure://a/b', True),
    ('./c4', False), ('/c4', False), ('c4', False), ('odd:name/c4', False), (None, False)])
def test_what_is_a_url(remote: Optional[str], url: bool):
    assert is_url(remote) is url


def test_gs_is_read_as_s3_is(build, s3: Server, whole, monkeypatch):
    from boto3.session import Session

    client = Session.client
    monkeypatch.setenv('GCS_KEY', 'none')
    monkeypatch.setenv('GCS_SECRET', 'none')
    monkeypatch.setattr(Session, 'client', lambda self, *args, **kwargs: client(
        self, *args, **{**kwargs, 'endpoint_url': s3.url, 'region_name': 'us-east-1'}))
    assert rows(build(remote='gs://bucket/data')) == whole


# ---------------------------------------------------------------- a cache with room for a few shards


class Watch(threading.Thread):
    """Measures every millisecond how many bytes the shards in a folder take; `most` is the largest result."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.most, self.stop = folder, 0, threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.001):
            total = 0
            for path in self.folder.glob('*.mds'):
                try:
                    total += path.stat().st_size
                except FileNotFoundError:
                    continue
            self.most = max(self.most, total)


@pytest.fixture
def sizes(data: Path) -> tuple[int, int]:
    """Bytes of the index, and of the largest shard."""
    return (data / 'train' / 'index.json').stat().st_size, max(p.stat().st_size for p in (data / 'train').glob('*.mds'))


@pytest.mark.slow
@pytest.mark.parametrize('num_workers', [0, 4])
def test_a_small_cache_under_load(build, whole, sizes, tmp_path: Path, num_workers: int):
    index, shard = sizes
    limit = index + 4 * shard
    watch = Watch(tmp_path / 'copy' / 'train')
    watch.start()
    loader = build(num_workers, shuffle=True, cache_limit=limit, num_canonical_nodes=8)
    epochs = [rows(loader) for _ in range(4)]
    watch.stop.set()
    watch.join()
    assert all(Counter(map(tuple, epoch)) == Counter(map(tuple, whole)) for epoch in epochs) and epochs[0] != epochs[1]
    in_flight = 2 * max(num_workers, 1)  # a prefetching thread and a reader in each worker
    assert 3 * shard < watch.most <= limit - index + in_flight * shard
    left = sum(path.stat().st_size for path in (tmp_path / 'copy' / 'train').glob('*.mds'))
    assert left <= limit - index + in_flight * shard


RANK = """
import json, sys
from src.data_c4 import build_c4_dataloader
cfg = json.loads(sys.argv[1])
loader = build_c4_dataloader(cfg, 5)
for _ in range(3):
    with open(sys.argv[2], 'a') as out:
        print(json.dumps([row for batch in loader for row in batch['input_ids'].tolist()]), file=out)
"""


@SLOW
def test_two_ranks_share_a_small_cache(data: Path, whole, sizes, tmp_path: Path):
    dataset = {'remote': str(data), 'local': str(tmp_path / 'copy'), 'split': 'train', 'max_seq_len': 32, 'shuffle': True,
               'tokenizer_name': str(data / 'tokenizer'), 'num_canonical_nodes': 8, 'cache_limit': sizes[0] + 4 * sizes[1]}
    port = str(free_port())
    watch = Watch(tmp_path / 'copy' / 'train')
    watch.start()
    env = {'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port, 'TMPDIR': str(tmp_path)}
    command = [sys.executable, '-c', RANK, json.dumps({'dataset': dataset, 'num_workers': 2})]
    out = [tmp_path / f'rank{i}' for i in range(2)]
    ranks = [Popen([*command, str(out[i])], cwd=ROOT, env=clean_env(RANK=str(i), LOCAL_RANK=str(i), **env))
             for i in range(2)]
    try:
        assert [rank.wait(120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    watch.stop.set()
    watch.join()
    for epoch in zip(*(path.read_text().splitlines() for path in out), strict=True):
        assert Counter(map(tuple, chain(*map(json.loads, epoch)))) == Counter(map(tuple, whole))
    assert watch.most <= (4 + 2 * 2 * 2) * sizes[1]


# ---------------------------------------------------------------- several streams


SIZES = {'web': 700, 'books': 200, 'code': 100}
GLOBAL = 48
WORLDS = [(1, 1, 1), (1, 4, 2), (3, 2, 1), (2, 8, 3), (48, 1, 1), (1, 48, 1)]


@pytest.fixture(scope='session')
def mixed(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three splits of sequences of 8 tokens: token 0 is the number of the stream, tokens 1 and 2 that of the sample."""
    root = tmp_path_factory.mktemp('mixed')
    shutil.copytree(tokenizer_dir, root / 'tokenizer')
    for number, (name, n) in enumerate(SIZES.items()):
        stored = [np.array([number + 1, i // 400, i % 400, *[7] * 5], np.uint16) for i in range(n)]
        write_mds(root / name, [{'tokens': row} for row in stored], {'tokens': 'ndarray:uint16:8'}, size_limit=1 << 10)
    return root


@pytest.fixture
def mix(mixed: Path):
    """Builds loaders of several streams with the weights of a test."""
    def build(streams: dict[str, dict], batch_size: int = GLOBAL, num_workers: int = 0, evaluate: bool = False,
              eval_samples: int = -1, **dataset: Any):
        places = {name: {'local': str(mixed), 'split': name, **stream} for name, stream in streams.items()}
        cfg = {'streams': places, 'split': '',
               'tokenizer_name': str(mixed / 'tokenizer'), 'max_seq_len': 8, 'num_canonical_nodes': 4, **dataset}
        cfg = {'dataset': cfg, 'num_workers': num_workers, 'eval_samples': eval_samples}
        return build_c4_dataloader(cfg, batch_size, evaluate)
    return build


def counts(found: list[list[int]]) -> dict[str, int]:
    names = list(SIZES)
    return dict(Counter(names[row[0] - 1] for row in found))


THIRDS = {'web': {'proportion': 3}, 'books': {'proportion': 2}, 'code': {'proportion': 1}}


@pytest.mark.parametrize('num_workers', [0, pytest.param(3, marks=SLOW)])
@pytest.mark.parametrize(('streams', 'dataset', 'expected'), [
    ({name: {} for name in SIZES}, {}, None),
    (THIRDS, {'epoch_size': 96 * 6}, {'web': 288, 'books': 192, 'code': 96}),
    (THIRDS, {'epoch_size': 48 * 3 * 6, 'sampling_method': 'fixed'}, {'web': 432, 'books': 288, 'code': 144}),
    ({'web': {'repeat': 0.48}, 'books': {'repeat': 1.68}, 'code': {'choose': 96}}, {}, {'web': 336, 'books': 336, 'code': 96}),
    (THIRDS, {'epoch_size': 96 * 6, 'batching_method': 'stratified'}, {'web': 288, 'books': 192, 'code': 96}),
    (THIRDS, {'epoch_size': 96 * 6, 'batching_method': 'per_stream'}, {'web': 288, 'books': 192, 'code': 96}),
], ids=['all', 'proportion', 'fixed', 'repeat-choose', 'stratified', 'per_stream'])
@pytest.mark.parametrize('shuffle', [False, True])
def test_an_epoch_has_each_streams_share(mix, num_workers: int, streams, dataset, expected, shuffle: bool):
    loader = mix(streams, num_workers=num_workers, shuffle=shuffle, **dataset)
    for _ in range(2):
        batches = [batch['input_ids'].tolist() for batch in loader]
        found = list(chain(*batches))
        assert len(batches) == len(loader)
        if expected is None:
            assert len(found) == 1000 // GLOBAL * GLOBAL and len({tuple(row) for row in found}) == len(found)
            continue
        assert counts(found) == expected
        if dataset.get('batching_method') == 'stratified':
            assert all(counts(batch) == {'web': 24, 'books': 16, 'code': 8} for batch in batches)
        elif dataset.get('batching_method') == 'per_stream':
            assert all(len(counts(batch)) == 1 for batch in batches)


def global_batches(dataset: StreamingC4, shape: tuple[int, int, int], epoch: int, seen: int = 0) -> list[list[int]]:
    """The samples of each global batch, sorted, as the ranks' DataLoaders take them from their workers in turns."""
    world = World(*shape, 0)
    dataset.batch_size = GLOBAL // world.num_ranks
    work = generate_work(dataset.batching_method, dataset, world, epoch, seen)
    return [sorted(batch.tolist()) for batch in work.transpose(3, 2, 0, 1, 4).reshape(-1, GLOBAL) if batch[0] >= 0]


@pytest.mark.parametrize('method', ['random', 'stratified', 'per_stream'])
@pytest.mark.parametrize('weights', [THIRDS, {name: {} for name in SIZES}], ids=['proportion', 'all'])
def test_the_order_of_streams_is_that_of_one_device(mix, method: str, weights):
    loader = mix(weights, shuffle=True, batching_method=method)
    dataset = loader.dataset
    dataset._set_shuffle_block_size(World(1, 1, 1, 0))
    alone = [global_batches(dataset, (1, 1, 1), epoch) for epoch in range(2)]
    assert len(alone[0]) == len(loader) and alone[0] != alone[1]
    for shape in WORLDS:
        assert global_batches(dataset, shape, 0) == alone[0], shape
        assert global_batches(dataset, shape, 1) == alone[1], shape
        assert global_batches(dataset, shape, 1, 3 * GLOBAL) == alone[1][3:], shape


@pytest.mark.parametrize('method', ['random', 'stratified', 'per_stream'])
@pytest.mark.parametrize('num_workers', [pytest.param(0, marks=SLOW), 2])
def test_resumes_in_the_middle_of_an_epoch(mix, method: str, num_workers: int):
    settings = {'shuffle': True, 'batching_method': method, 'epoch_size': 576}
    loader = mix(THIRDS, num_workers=num_workers, **settings)
    epochs = [[batch['input_ids'].tolist() for batch in loader] for _ in range(2)]
    resumed = mix(THIRDS, num_workers=2 - num_workers, **settings)
    resumed.dataset.load_state_dict(loader.dataset.state_dict(5 * GLOBAL, True))
    assert [batch['input_ids'].tolist() for batch in resumed] == epochs[1][5:]


def test_streams_have_places_and_settings_of_their_own(mixed: Path, mix, tmp_path: Path):
    copies = tmp_path / 'copies'
    loader = mix({'web': {'remote': str(mixed), 'local': str(copies / 'a'), 'download_retry': 5},
                  'books': {'remote': str(mixed), 'local': str(copies / 'b'), 'keep_zip': True}, 'code': {}}, batch_size=10)
    assert [(s.download_retry, s.keep_zip, s.remote) for s in loader.dataset.streams] == [
        (5, False, str(mixed)), (2, True, str(mixed)), (2, False, None)]
    assert counts(rows(loader)) == SIZES
    assert sorted(path.name for path in copies.glob('*/*')) == ['books', 'web']


def test_a_missing_shard_names_its_stream(mixed: Path, mix, tmp_path: Path):
    shutil.copytree(mixed / 'books', tmp_path / 'remote' / 'books')
    (tmp_path / 'remote' / 'books' / 'shard.00001.mds').unlink()
    loader = mix({'web': {}, 'books': {'remote': str(tmp_path / 'remote'), 'local': str(tmp_path / 'copy')}}, num_workers=2)
    with pytest.raises(UserError, match=rf'^dataset.streams.books.remote: shard.00001.mds of {tmp_path}/remote/books could not'):
        rows(loader)


@pytest.mark.slow
def test_the_fingerprint_covers_all_streams(mix):
    prints = [mix(streams, batch_size=4).dataset.fingerprint for streams in (
        {'web': {}}, {'web': {}, 'books': {}}, {'books': {}, 'web': {}}, {'web': {'repeat': 0.5}, 'books': {}}, THIRDS)]
    assert len(set(prints)) == 5
    assert mix({'other name': {'split': 'web'}, 'books': {}}, batch_size=4).dataset.fingerprint == prints[1]


@pytest.mark.parametrize('world_size', [1, 3])
@pytest.mark.parametrize(('eval_samples', 'expected'), [(-1, SIZES), (100, {'web': 70, 'books': 20, 'code': 10}),
                                                        (7, {'web': 4, 'books': 2, 'code': 1})])
def test_evaluation_takes_from_every_stream(mix, world_size: int, eval_samples: int, expected):
    loader = mix({name: {} for name in SIZES}, batch_size=8, evaluate=True, eval_samples=eval_samples)
    view: EvalView = loader.dataset
    seen = []
    for rank in range(world_size):
        sampler = DistributedSampler(view, world_size, rank, shuffle=False)
        found = [view[i]['input_ids'].tolist() for i in sampler]
        seen += found[:-1] if rank >= world_size - (sampler.total_size - len(view)) else found
    assert counts(seen) == expected and len({tuple(row) for row in seen}) == len(seen)
    assert rows(loader) == [sample['input_ids'].tolist() for sample in view]


def test_evaluation_ignores_weights(mix):
    with pytest.warns(UserWarning, match=r'eval_loader.dataset.streams.web.proportion is ignored'):
        loader = mix(THIRDS, batch_size=8, evaluate=True)
    assert counts(rows(loader)) == SIZES


def test_training_and_evaluation_copy_to_places_of_their_own(mixed: Path, mix, tmp_path: Path):
    streams = {name: {'remote': str(mixed), 'local': str(tmp_path / name)} for name in ('web', 'code')}
    train, evals = mix(streams), mix(streams, evaluate=True)
    assert len(rows(train)) == 768 and counts(rows(evals)) == {'web': 700, 'code': 100}
    assert (tmp_path / 'web' / 'eval' / 'web' / 'index.json').is_file()


@pytest.mark.parametrize(('streams', 'dataset', 'says'), [
    ({'web': {}, 'nosuch': {}}, {}, r"dataset.streams.nosuch: .* has no split 'nosuch'; it has: books, code, web"),
    ({'web': {}, 'code': {'split': 'web'}}, {}, r"dataset.streams.code.local: .* is also the folder of dataset.streams.web"),
    ({'web': {'proportion': 1}, 'code': {}}, {}, 'dataset.streams.code.proportion: missing; if one stream has a proportion'),
    ({'web': {'repeat': 1, 'choose': 3}}, {}, 'dataset.streams.web: repeat and choose are set together; set only one'),
    ({'web': {'repeat': 1.5}}, {'epoch_size': 10}, 'dataset.epoch_size: 10 does not go with repeat or choose'),
    ({'web': {'proportion': 0}}, {}, 'dataset.streams.web.proportion: 0 must be greater than 0'),
    ({'web': {'propotion': 1}}, {}, "dataset.streams.web.propotion: no such key; did you mean 'proportion'"),
    ({'web': {}}, {'local': '/x'}, "dataset.local: '/x' does not go with streams"),
    ({'web': {}}, {'cache_limit': '1gb'}, "dataset.cache_limit: '1gb' with no remote would delete the only copy"),
    ({'web': {'proportion': 1}, 'code': {'proportion': 0.001}}, {'batching_method': 'stratified'},
     r"dataset.streams.code: gives \d+ samples to an epoch and 0 to a batch of global_train_batch_size 48, but"),
    ({'web': {}, 'code': {'choose': 40}}, {'batching_method': 'per_stream'},
     "dataset.streams.code: gives 40 samples to an epoch and 48 to a batch"),
])
def test_mistakes_in_streams_are_named(mix, streams, dataset, says: str):
    with pytest.raises(UserError, match=says):
        mix(streams, **dataset)


def test_a_dataset_needs_a_place(build):
    with pytest.raises(UserError, match='dataset.local: missing; set the folder'):
        build(remote=None, local=None)
    with pytest.raises(UserError, match='dataset.streams: .*at least 1 item'):
        build(remote=None, local=None, streams={})


def test_streams_hold_one_kind(mixed: Path, mds_root: Path, tokens_root: Path, mix, tmp_path: Path):
    write_mds(tmp_path / 'longer', [{'tokens': np.zeros(9, np.uint16)}], {'tokens': 'ndarray:uint16:9'})
    for other, says in (({'local': str(mds_root), 'split': 'val'}, 'streams.x holds text'),
                        ({'local': str(tmp_path), 'split': 'longer'}, 'streams.x holds sequences of 9 tokens')):
        with pytest.raises(UserError, match='dataset.streams: all must hold text, or all tokens of one length, but '
                                            f'dataset.streams.web holds sequences of 8 tokens; dataset.{says}'):
            mix({'web': {}, 'x': other})
    with pytest.raises(UserError, match='dataset.max_seq_len: 8, but the sequences in .* have 32 tokens'):
        mix({'web': {}, 'x': {'local': str(tokens_root), 'split': 'val'}})


def test_streams_of_text(mds_root: Path, tokenizer_dir: Path):
    cfg = {'streams': {'a': {'local': str(mds_root), 'split': 'train'}, 'b': {'local': str(mds_root)}}, 'split': 'val',
           'tokenizer_name': str(tokenizer_dir), 'max_seq_len': 64, 'num_canonical_nodes': 1}
    assert len(rows(build_c4_dataloader({'dataset': cfg}, 10))) == 490
    packed = rows(build_c4_dataloader({'dataset': {**cfg, 'group_method': 'concat'}}, 10))
    assert len(packed) > 500 and packed[0] != packed[-1]


STREAMS = ['train_loader.dataset.remote=null', 'train_loader.dataset.local=null', 'train_loader.dataset.split=train',
           'train_loader.dataset.streams={a: {local: DATA}, b: {local: DATA, split: val}}']


def check(*overrides: str):
    argv = [str(ROOT / 'yamls' / 'quickstart.yaml'), *overrides]
    return check_config(config.load(argv), plugins.REGISTRIES, 1, False)


@pytest.mark.parametrize(('overrides', 'says'), [
    (STREAMS, "eval_loader.dataset.split: 'val' is also what train_loader reads"),
    ([*STREAMS[1:], 'train_loader.dataset.remote=./x'],
     "train_loader.dataset.remote: './x' does not go with streams, which have their own remote; remove streams, or"),
    ([*STREAMS, 'train_loader.dataset.streams.a.lokal=x'], "streams.a.lokal: no such key; did you mean 'local'"),
    ([*STREAMS, 'train_loader.dataset.streams.c={split: x}'], 'train_loader.dataset.streams.c.local: missing'),
    ([*STREAMS, 'train_loader.dataset.streams.a.repeat=x'], "train_loader.dataset.streams.a.repeat: 'x' must be a number"),
    ([*STREAMS, 'train_loader.dataset.streams.a.proportion=1'], 'train_loader.dataset.streams.b.proportion: missing'),
    ([*STREAMS, 'train_loader.dataset.cache_limit=1gb'], "train_loader.dataset.cache_limit: '1gb' with no remote"),
    (STREAMS[:3], 'train_loader.dataset.local: missing'),
])
def test_mistakes_in_a_yaml_are_found_before_the_data_is_opened(overrides: list[str], says: str):
    with pytest.raises(UserError) as e:
        check('data_remote=./my-copy-c4', *(o.replace('DATA', './my-copy-c4') for o in overrides))
    assert says in str(e.value)


def test_a_yaml_with_streams_trains(mds_root: Path, tmp_path: Path, capfd):
    argv = tiny(mds_root, *(o.replace('DATA', str(mds_root)) for o in STREAMS), 'allow_same_split=true', 'max_duration=3ba',
                'scheduler.t_warmup=1ba', 'train_loader.dataset.shuffle=true')
    assert main.cli([str(ROOT / 'yamls' / 'quickstart.yaml'), *argv]) == 0, capfd.readouterr().err

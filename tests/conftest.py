"""Fixtures of all tests: a tiny dataset and tokenizer, offline."""

import os

os.environ['HF_HUB_OFFLINE'] = '1'
os.environ['TOKENIZERS_PARALLELISM'] = 'false'
os.environ['TQDM_DISABLE'] = '1'
os.environ['TORCH_WARM_POOL'] = '0'  # no compile workers of inductor in processes that compile nothing
if 'PYTEST_XDIST_WORKER' in os.environ:  # processes of two threads each would wait for each other on two cores
    os.environ.setdefault('OMP_NUM_THREADS', '1')

import atexit
import functools
import gc
import inspect
import logging
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, groupby, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional
from urllib.request import urlopen

import numpy as np
import pytest

EOS = '<|endoftext|>'
N_DOCUMENTS = {'train': 400, 'val': 90}
WORDS = """the a of and to in is was that for it with on as by at from river mountain engine letter winter garden number
    children market science music history light water measure question answer city forest machine story slowly often
    never perhaps quietly built found carried wrote asked kept opened changed learned grew""".split()  # noqa: SIM905
# `pytest -m unit` runs the tests of these modules, except those whose code matches RUNS: they start a process or train.
UNIT = ('test_errors_and_text', 'test_config', 'test_old_keys', 'test_yamls', 'test_documents', 'test_source_files',
        'test_encoding', 'test_fast_encoding', 'test_tokenizer', 'test_causal_lm', 'test_layers', 'test_mosaic_gpt',
        'test_environment', 'test_house')
RUNS = re.compile(r'subprocess|main\.(main|cli)|\.fit\(|convert_c4\.main|num_workers=[1-9]')
n_left = [0]  # datasets that stayed open, each time that the others were freed
SEMAPHORES = r'sem\.(mp|loky)-.*'


def pytest_configure(config: pytest.Config) -> None:
    """Gives the session its own temporary folder, and deletes the folder at the end with all leftovers."""
    if hasattr(config, 'workerinput'):
        return
    os.environ.setdefault('PYTEST_DEBUG_TEMPROOT', tempfile.gettempdir())  # keeps the folders of failed tests
    folder, before = tempfile.TemporaryDirectory(prefix='kit-tests-', ignore_cleanup_errors=True), orphans(SEMAPHORES)
    os.environ['TMPDIR'] = tempfile.tempdir = folder.name

    def tidy() -> None:
        tempfile.tempdir = None
        folder.cleanup()
        for path in (Path('/dev/shm', name) for name in orphans(SEMAPHORES) - before):
            with suppress(OSError):  # another process has just removed it
                if path.stat().st_uid == os.getuid():
                    path.unlink()

    config.add_cleanup(tidy)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        is_run = item.get_closest_marker('slow') or RUNS.search(inspect.getsource(item.function))  # pyright: ignore
        if item.path.stem in UNIT and not is_run:
            item.add_marker('unit')
    gpu_tests = [item for item in items if item.get_closest_marker('gpu')]
    if gpu_tests and not torch_with_gpu():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason='no GPU'))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> Optional[bool]:
    """With `-m unit`, skips the import of all other test modules."""
    others = collection_path.suffix == '.py' and collection_path.stem not in UNIT
    return True if others and config.getoption('markexpr') == 'unit' else None


@pytest.hookimpl(tryfirst=True)  # before a worker of xdist tells the order of its tests
def pytest_collection_finish(session: pytest.Session) -> None:
    """Orders the tests, and exempts all that imports made from garbage collection: a collection would take 0.4 s.

    The first share of each worker of xdist is contiguous. It begins with some of the modules that take longest.
    """
    def limit(item: pytest.Item) -> float:
        mark = item.get_closest_marker('timeout')
        return mark.args[0] if mark else 0

    n_workers, n_items = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1)), len(session.items)
    shares: list[list[pytest.Item]] = [[] for _ in range(n_workers)]
    longest = sorted(filter(limit, session.items), key=limit, reverse=True)
    for i, (_, module) in enumerate(groupby(longest, lambda item: item.path)):
        shares[i % n_workers] += module
    others = iter([item for item in session.items if not limit(item)])
    for i, share in enumerate(shares):
        n_items -= (size := n_items // (n_workers - i))
        share += islice(others, max(0, size - len(share)))
    session.items[:] = chain(*shares, others)
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def logger_as_it_was() -> Iterator[None]:
    """Restores the logger: a run of main.py hides its messages from other handlers, such as the next test's."""
    yield
    logger = logging.getLogger('src')
    logger.handlers, logger.propagate = [], True


@pytest.fixture(autouse=True)
def cpu_unless_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides the GPU from tests without the mark `gpu`, because their numbers are those of the CPU."""
    if not request.node.get_closest_marker('gpu'):
        if torch_with_gpu():
            monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    elif torch_with_gpu():
        import torch._dynamo
        torch._dynamo.reset()  # torch stops compiling after 8 models in one process
        torch._dynamo.utils.counters.clear()


def pytest_runtest_setup() -> None:
    """Frees the blocks of datasets that are gone. Composer and streaming keep runs and blocks to the end of a process, and
    each dataset that opens would look at all of them.

    A dataset that is gone has cleared the first bytes of its block `NNNNNN_locals`; NNNNNN is its prefix."""
    if 'streaming' not in sys.modules or n_open_datasets() < n_left[-1] + 10:
        return
    from composer.core import Engine
    from streaming.base.shared import SharedMemory

    atexit.unregister(Engine._close)
    gc.collect()
    blocks = [block for block in gc.get_objects()
              if type(block) is SharedMemory and (block.created_shms or block.opened_shms) and block.shm.buf is not None]
    gone = {block.shm.name[:6] for block in blocks if block.shm.name.endswith('_locals') and not any(block.buf[:4])}
    for block in blocks:
        if block.shm.name[:6] in gone:
            atexit.unregister(block.cleanup)
            block.cleanup()
    n_left.append(n_open_datasets())


def n_open_datasets() -> int:
    """Datasets whose blocks this process has mapped."""
    return Path('/proc/self/maps').read_text().count('_locals\n')


@functools.cache
def torch_with_gpu() -> bool:
    import torch  # here, because tests of the config do without its import
    return torch.cuda.is_available()


def documents(split: str) -> list[str]:
    """The documents of a split, of a few words to a few hundred; the same on every call."""
    rng = random.Random(split)
    texts = []
    for i in range(N_DOCUMENTS[split]):
        sentences = [' '.join(rng.choices(WORDS, k=rng.randint(4, 14))).capitalize() + '.' for _ in range(rng.randint(1, 12))]
        texts.append(f'Document {i} of {split}. ' + ' '.join(sentences))
    return texts


def write_mds(folder: Path, rows: list[dict[str, Any]], columns: dict[str, str], size_limit: int = 1 << 14) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns=columns, size_limit=size_limit, progress_bar=False) as out:
        for row in rows:
            out.write(row)


@pytest.fixture(scope='session')
def mds_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `train` and `val` (C4's columns, several shards each) and `tokenizer`."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp('my-copy-c4')
    for split in N_DOCUMENTS:
        rows = [{'text': text, 'timestamp': '2019-04-25T12:57:54Z', 'url': f'https://example.org/{split}/{i}'}
                for i, text in enumerate(documents(split))]
        write_mds(root / split, rows, {'text': 'str', 'timestamp': 'str', 'url': 'str'})
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(documents('train'), vocab_size=512, special_tokens=[EOS], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=EOS).save_pretrained(root / 'tokenizer')
    return root


@pytest.fixture(scope='session')
def tokenizer_dir(mds_root: Path) -> Path:
    """A byte-level BPE tokenizer of up to 512 tokens, trained on the split `train`."""
    return mds_root / 'tokenizer'


@pytest.fixture(scope='session')
def tokens_root(mds_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documents of `mds_root` as packed tokens: splits of sequences of 32, in several shards each, and `tokenizer`.

    `train` has the first 500 sequences, `val` all that are full.
    """
    from tokenizers import Tokenizer

    root = tmp_path_factory.mktemp('my-tokens')
    shutil.copytree(mds_root / 'tokenizer', root / 'tokenizer')
    tokenizer = Tokenizer.from_file(str(root / 'tokenizer' / 'tokenizer.json'))
    for split, limit in (('train', 500), ('val', None)):
        tokens = [token for text in documents(split) for token in [*tokenizer.encode(text).ids, tokenizer.token_to_id(EOS)]]
        packed = np.array(tokens[:len(tokens) // 32 * 32], np.uint16).reshape(-1, 32)[:limit]
        write_mds(root / split, [{'tokens': row} for row in packed], {'tokens': 'ndarray:uint16'}, size_limit=1 << 12)
    return root


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of an S3 server on loopback with an empty `bucket`. Programs that tests start use the same server."""
    import boto3
    from moto.server import ThreadedMotoServer

    from src.config.data_places import _fetched_index
    for key, value in (('AWS_ACCESS_KEY_ID', 'none'), ('AWS_SECRET_ACCESS_KEY', 'none'), ('AWS_DEFAULT_REGION', 'us-east-1')):
        monkeypatch.setenv(key, value)
    server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)
    server.start()
    url = 'http://{}:{}'.format(*server.get_host_and_port())
    monkeypatch.setenv('S3_ENDPOINT_URL', url)
    client = boto3.client('s3', endpoint_url=url)
    client.create_bucket(Bucket='bucket')
    _fetched_index.cache_clear()  # forget the index in the bucket of another test
    yield client
    urlopen(f'{url}/moto-api/reset', data=b'')  # else the next server in this process has the old bucket
    server.stop()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Like `s3_server`, for one test."""
    with s3_server(monkeypatch) as client:
        yield client


@pytest.fixture
def retries_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the clients of object stores retry as often as ever, but without their waits of up to a minute."""
    monkeypatch.setattr('botocore.endpoint.time', SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr('streaming.base.util.sleep', lambda seconds: None)


def orphans(pattern: str = r'\d{6}_[a-z_]+') -> set[str]:
    """Names in /dev/shm that no living process uses; by default those of streaming."""
    found = {path.name for path in Path('/dev/shm').glob('*') if re.fullmatch(pattern, path.name)}
    mapped: set[str] = set()
    for maps in Path('/proc').glob('[0-9]*/maps'):
        try:
            mapped |= set(re.findall(r'/dev/shm/(\S+)$', maps.read_text(errors='replace'), re.MULTILINE))
        except OSError:
            continue
    return found - mapped


def leaves_no_orphans(below: Path, before: frozenset[str] = frozenset()) -> bool:
    """Waits until no orphans of datasets below this folder are left. Others may belong to a test beside this one."""

    def ours(block: str) -> bool:
        try:
            return str(below).encode() in Path('/dev/shm', f'{block[:6]}_locals').read_bytes()
        except OSError:
            return True

    deadline = time.monotonic() + 20
    while (left := {*filter(ours, orphans() - before)}) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not left

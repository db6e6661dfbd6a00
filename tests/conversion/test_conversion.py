"""Processes, machines and interruptions give the bytes of one plain run, and no finished part is lost."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional, Union
from urllib.request import urlopen

import numpy as np
import pytest
from conftest import EOS, leaves_no_orphans
from conftest import documents as prose
from hub_server import HubServer
from test_convert_c4 import REPO, c4_documents, convert, fingerprint, read_split, small_disk, start, write_file  # noqa: F401
from xxhash import xxh3_128_intdigest

from src.common import storage
from src.common.errors import UserError
from src.conversion import output, parts, shards
from src.conversion.documents import read_documents
from src.conversion.manifest import verify
from src.conversion.shards import token_dtype
from src.conversion.sources import hide_url_secrets
from src.conversion.tokenizer import load_packing_tokenizer, write_tokenizer

ODD = ['', f'text that spells {EOS}, twice: {EOS}', ' leading', 'naïve 日本 🙂\x00\r\n\ttab  end ', 'long ' * 40_000]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def manifest(split: Path) -> dict[str, Any]:
    return json.loads((split / 'manifest.json').read_text())


def counts(split: Path) -> tuple[int, str, Optional[int]]:
    found = manifest(split)
    return found['documents'], found['texts_hash'], found.get('tokens')


def write_jsonl(path: Path, texts: list[str], end: str = '\n', column: str = 'text') -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(''.join(json.dumps({column: text}) + end for text in texts).encode())
    return path


@pytest.fixture(scope='module')
def texts() -> list[str]:
    return prose('train') + ODD


@pytest.fixture(scope='module')
def source(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five train files, one validation file, named as C4's."""
    folder = tmp_path_factory.mktemp('source')
    for split, name, n in ('train', 'c4-train.{:05}-of-01024.json.gz', 5), ('val', 'c4-validation.{:05}-of-00008.json.gz', 1):
        these = texts if split == 'train' else prose('val')
        size = -(-len(these) // n)
        for i in range(n):
            write_file(folder / name.format(i), [{'text': text, 'timestamp': '2019-04-25T12:57:54Z', 'url': f'{split}/{i}/{j}'}
                                                 for j, text in enumerate(these[i * size:(i + 1) * size])])
    return folder


@pytest.fixture(scope='module')
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen train files that take about half a second each."""
    folder = tmp_path_factory.mktemp('big')
    for i in range(16):
        rows = ({'text': f'{i} {j} ' + 'lorem ipsum ' * 20, 'timestamp': '', 'url': f'{j}'} for j in range(20_000))
        data = gzip.compress('\n'.join(map(json.dumps, rows)).encode(), 1)
        (folder / f'c4-train.{i:05}-of-01024.json.gz').write_bytes(data)
    return folder


@pytest.fixture(scope='module')
def big_whole(big: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one process makes of `big` without an interruption."""
    out = tmp_path_factory.mktemp('big_whole')
    convert(out, big, 'train')
    return tree(out)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of a real S3 server on loopback that holds an empty bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    for name in ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY', 'AWS_DEFAULT_REGION'):
        monkeypatch.setenv(name, 'us-east-1' if name.endswith('REGION') else 'none')
    server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)
    server.start()
    url = 'http://{}:{}'.format(*server.get_host_and_port())
    monkeypatch.setenv('S3_ENDPOINT_URL', url)
    output._downloader.cache_clear()  # of an earlier server
    client = boto3.client('s3', endpoint_url=url)
    client.create_bucket(Bucket='bucket', CreateBucketConfiguration={'LocationConstraint': 'eu-west-1'})
    yield client
    urlopen(f'{url}/moto-api/reset', data=b'')
    server.stop()


def objects(s3: Any, prefix: str) -> dict[str, bytes]:
    pages = s3.get_paginator('list_objects_v2').paginate(Bucket='bucket', Prefix=prefix)
    return {o['Key'].removeprefix(prefix): s3.get_object(Bucket='bucket', Key=o['Key'])['Body'].read()
            for page in pages for o in page.get('Contents', [])}


def finish(process: subprocess.Popen, status: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, out + err
    assert 'Traceback' not in out + err
    return out, err


# ---------------------------------------------------------------- the same from every way


@pytest.mark.parametrize('tokens', [False, pytest.param(True, marks=pytest.mark.slow)], ids=['text', 'tokens'])
def test_partitions_and_workers_give_the_bytes_of_one_run(tokens: bool, source: Path, tokenizer_dir: Path, tmp_path: Path,
                                                          texts: list[str], capsys: pytest.CaptureFixture) -> None:
    options: dict[str, Any] = {'concat_tokens': 32, 'tokenizer': tokenizer_dir, 'hashes': 'sha1 xxh64'} if tokens else {}
    convert(tmp_path / 'one', source, **options)
    one = tree(tmp_path / 'one')
    assert len(manifest(tmp_path / 'one/train')['files']) == 1 + 5 * 2

    for i in (2, 0, 1):
        convert(tmp_path / 'parts', source, partition=f'{i}/3', **options)
    assert not (tmp_path / 'parts/train/index.json').exists()
    convert(tmp_path / 'parts', source, merge=True, **options)
    assert tree(tmp_path / 'parts') == one

    if tokens:  # four processes
        argv = ['--num_workers', '4', '--concat_tokens', '32', '--tokenizer', str(tokenizer_dir), '--hashes', 'xxh64', 'sha1']
        _, err = finish(start(tmp_path / 'four', source, 'train', 'val', argv=argv))
        assert tree(tmp_path / 'four') == one
        assert f'train: {len(texts)} documents [' in err, 'the bar counts the documents of all workers'
    convert(tmp_path / 'zstd', source, compression='zstd:7', **options)
    assert tree(tmp_path / 'zstd') != one and counts(tmp_path / 'zstd/train') == counts(tmp_path / 'one/train')
    from streaming import StreamingDataset
    rows = [dict(row) for row in StreamingDataset(local=str(tmp_path / 'zstd/train'), batch_size=1)]
    assert str(rows) == str(read_split(tmp_path / 'one/train')) and len(rows) > 100
    assert leaves_no_orphans(tmp_path)


def test_the_hash_of_the_texts_is_the_sum_of_their_hashes(source: Path, tmp_path: Path, texts: list[str]) -> None:
    convert(tmp_path, source, 'train')
    total = sum(xxh3_128_intdigest(text.encode()) for text in texts)
    assert manifest(tmp_path / 'train')['texts_hash'] == f'{total % 2**128:032x}'


def test_the_index_is_the_one_that_streaming_merges(source: Path, tmp_path: Path) -> None:
    from streaming.base.util import merge_index

    convert(tmp_path / 'out', source, 'train', compression='zstd')
    merge_index([str(path) for path in sorted(tmp_path.glob('out/train/*/index.json'))], str(tmp_path / 'merged'))
    assert (tmp_path / 'out/train/index.json').read_bytes() == (tmp_path / 'merged/index.json').read_bytes()


def test_shards_are_those_of_the_plain_writer(source: Path, tmp_path: Path) -> None:
    from streaming import MDSWriter

    convert(tmp_path / 'out', source, 'train', size_limit='4kb')
    part = tmp_path / 'out/train/00000'
    columns = ('text', 'timestamp', 'url')
    with MDSWriter(out=str(tmp_path / 'plain'), columns=dict.fromkeys(columns, 'str'), size_limit='4kb') as out:
        for document in read_documents(next(source.glob('*train*00000*')), columns):
            out.write(document)
    written = {path.name: path.read_bytes() for path in (tmp_path / 'plain').iterdir()}
    assert len(written) > 3 and written == {name: (part / name).read_bytes() for name in written}


def test_gz_shards_do_not_hold_the_time(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for now in 1e9, 2e9:
        monkeypatch.setattr('time.time', lambda now=now: now)
        convert(tmp_path / f'{now}', source, 'val', compression='gz', hashes='sha1')
        made.append(tree(tmp_path / f'{now}'))
    assert made[0] == made[1] and 'val/00000/shard.00000.mds.gz' in made[0]
    monkeypatch.undo()
    from streaming import StreamingDataset
    assert len(list(StreamingDataset(local=str(tmp_path / '1000000000.0/val'), batch_size=1, validate_hash='sha1'))) == 90


def test_every_token_of_every_document_in_order(source: Path, tokenizer_dir: Path, texts: list[str], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    convert(tmp_path, source, 'train', concat_tokens=32, tokenizer=tokenizer_dir)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    shards = json.loads((tmp_path / 'train/index.json').read_text())['shards']
    assert shards[0]['column_encodings'] == ['ndarray:uint16:32']
    rows = [row['tokens'] for row in read_split(tmp_path / 'train')]
    assert {row.shape for row in rows} == {(32,)}  # pyright: ignore[reportAttributeAccessIssue]
    found, total, eos = [], 0, tokenizer.eos_token_id
    for i in range(5):
        part = json.loads((tmp_path / f'train/{i:05}/part.json').read_text())
        n = sum(shard['samples'] for shard in shards if shard['raw_data']['basename'].startswith(f'{i:05}/'))
        assert n == -(-part['tokens'] // 32), 'packing goes on across the documents of a file'
        stream, rows = np.concatenate(rows[:n]), rows[n:]
        assert (stream[part['tokens']:] == eos).all(), 'the end of a part is filled up with EOS'
        documents = np.split(stream[:part['tokens']], np.flatnonzero(stream[:part['tokens']] == eos) + 1)
        assert not len(documents.pop()), 'EOS ends the last one'
        found += [tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False) for ids in documents]
        total += part['tokens']
    assert found == texts and not rows
    assert total == manifest(tmp_path / 'train')['tokens'] == sum(len(tokenizer(t, split_special_tokens=True)['input_ids']) + 1
                                                                  for t in texts)


class Counter:
    """A tokenizer of 9 tokens and EOS, for which a document is the list of its tokens."""
    eos_token_id = 9

    @staticmethod
    def get_vocab() -> dict[str, int]:
        return {str(i): i for i in range(10)}


def test_packing_never_loses_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('src.common.encoding.encode_pieces', lambda _, texts: (
        [(np.array([*map(int, text)], np.uint32), False), (np.array([9], np.uint32), True)] for text in texts))
    rng, total = np.random.default_rng(0), {}
    given = [''.join(map(str, rng.integers(0, 9, rng.integers(0, 30)))) for _ in range(100)]
    stream = np.concatenate(list(shards.pack_tokens(({'text': text} for text in given), Counter, 7, total)))
    expected = np.concatenate([[*map(int, text), 9] for text in given])
    n = len(expected)
    assert (stream[:n] == expected).all() and len(stream) - n < 7 and (stream[n:] == 9).all()
    assert stream.dtype == np.uint8 and total == {'tokens': n}


@pytest.mark.parametrize('largest, name', [(255, 'uint8'), (256, 'uint16'), (65535, 'uint16'), (65536, 'uint32')])
def test_smallest_type_that_holds_the_vocabulary(largest: int, name: str) -> None:
    class Tokenizer:
        @staticmethod
        def get_vocab() -> dict[str, int]:
            return {'a': 0, 'added': largest}
    assert token_dtype(Tokenizer) == np.dtype(name)


def test_max_docs_and_train_small_take_the_first(source: Path, tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture) -> None:
    convert(tmp_path, source, 'train', max_docs=200)
    assert [row['text'] for row in read_split(tmp_path / 'train')] == texts[:200]
    assert sorted(os.listdir(tmp_path / 'train')) == ['00000', '00001', '00002', 'index.json', 'manifest.json']
    before = tree(tmp_path)
    convert(tmp_path, source, 'train', max_docs=200)
    assert tree(tmp_path) == before and manifest(tmp_path / 'train')['options']['max_docs'] == 200
    with pytest.raises(UserError, match='train/00000 was made with max_docs 200, now 300; use the same options'):
        convert(tmp_path, source, 'train', max_docs=300)
    monkeypatch.setattr('convert_c4.N_SMALL', 90)
    convert(tmp_path, source, 'train_small', 'val')
    assert [row['text'] for row in read_split(tmp_path / 'train_small')] == texts[:90]
    assert len(read_split(tmp_path / 'val')) == 90
    assert 'the source has 90' in capsys.readouterr().out


# ---------------------------------------------------------------- the hub


@pytest.mark.slow
def test_hub_that_fails_one_time_in_ten_gives_the_same_documents(source: Path, tmp_path: Path) -> None:
    rng, failed, listings = random.Random(5), [], []

    def fail(path: str) -> Union[int, str, None]:
        if '/tree/' in path and len(listings) < 3:  # at the start, three times in a row
            listings.append(path)
            return 'cut'
        if rng.random() < 0.1 or len(failed) < 2 and 'c4-train.00003' in path and '/resolve/' in path:
            failed.append(path)
            return [503, 'cut'][len(failed) % 2]
        return None

    convert(tmp_path / 'folder', source)
    temporary = tmp_path / 'tmp'
    temporary.mkdir()
    with HubServer(source, fail) as hub:
        env = {**hub.env(tmp_path / 'cache'), 'TMPDIR': str(temporary)}
        out, err = finish(start(tmp_path / 'hub', 'hub', 'train', 'val', argv=['--num_workers', '2'], **env))
    assert len(failed) > 2 and len(listings) == 3 and 'leaked semaphore' not in err
    assert 'train: 5 of the 1,024 files of C4 in allenai/c4 en' in out
    for split in 'train', 'val':
        assert counts(tmp_path / 'hub' / split) == counts(tmp_path / 'folder' / split)
        assert fingerprint(read_split(tmp_path / 'hub' / split)) == fingerprint(read_split(tmp_path / 'folder' / split))
    assert manifest(tmp_path / 'hub/val')['revision'] == '1588ec454efa1a09f29cd18ddd04fe05fc8653a2'
    assert os.listdir(temporary) == [] and not list((tmp_path / 'hub').rglob('.*'))


@pytest.mark.slow
def test_another_data_set_of_the_hub(texts: list[str], tmp_path: Path) -> None:
    write_jsonl(tmp_path / 'files/train-0.jsonl', texts, column='body')
    write_jsonl(tmp_path / 'files/validation-0.jsonl', ['one', 'two'], column='body')
    with HubServer(tmp_path / 'files', repo='some/books', config='old') as hub:
        argv = ['--dataset', 'some/books', '--config', 'old', '--text_column', 'body', '--num_workers', '1']
        out, err = finish(start(tmp_path / 'out', 'hub', 'train', 'val', argv=argv, **hub.env(tmp_path / 'cache')))
    assert [row['text'] for row in read_split(tmp_path / 'out/train')] == texts
    assert [row['text'] for row in read_split(tmp_path / 'out/val')] == ['one', 'two']
    assert manifest(tmp_path / 'out/train')['source'] == 'some/books old'


@pytest.mark.slow
def test_what_the_hub_refuses_is_said(source: Path, tmp_path: Path) -> None:
    cases: dict[str, tuple[list[str], str]] = {
        'no data set': (['--dataset', 'nobody/nothing'], '--source hub: nobody/nothing is not on the hub, or you have no access'),
        'no config': (['--config', 'de'], "--dataset: allenai/c4 de: BuilderConfig 'de' not found. Available: ['en']; set "),
        'no revision': (['--revision', 'no-such'], '--source hub: allenai/c4 en is not on the hub, or you have no access: check the '),
        'gated file': (['--splits', 'train'], 'or set HF_TOKEN'),
        'short name': (['--dataset', 'a b'], '--source hub: a b is not on the hub, or you have no access'),
    }
    code = ('import json, sys, convert_c4\n'
            'from src.common.errors import UserError\n'
            'for name, argv in json.loads(sys.argv[1]).items():\n'
            '    try:\n'
            '        convert_c4.main(convert_c4.parse_args([*argv, "--num_workers=1", "--out_root", sys.argv[2] + "/" + name]))\n'
            '    except UserError as error: print("CASE", json.dumps([name, str(error)]))\n')

    def fail(path: str) -> Union[int, str, None]:
        return 'gated' if 'c4-train.00000' in path and '/resolve/' in path else 404 if 'no-such' in path else None

    with HubServer(source, fail) as hub:
        argvs = json.dumps({name: argv for name, (argv, _) in cases.items()})
        done = subprocess.run([sys.executable, '-c', code, argvs, str(tmp_path)], cwd=REPO, text=True, capture_output=True,
                              env={**os.environ, **hub.env(tmp_path / 'cache'), 'HF_TOKEN': 'hf_secret'})
    assert done.returncode == 0 and 'hf_secret' not in done.stdout + done.stderr, done.stderr
    said = dict(json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith('CASE '))
    for name, (_, message) in cases.items():
        assert message in said.get(name, 'nothing'), (name, said.get(name))


def test_secrets_in_urls_are_not_shown() -> None:
    said = hide_url_secrets("HTTPSConnectionPool: https://me:hf_key@hub.co/x?X-Amz-Signature=abc&b=1 and s3://ID:KEY@bucket/a, http://h/y?z=1'")
    assert said == "HTTPSConnectionPool: https://***@hub.co/x?*** and s3://***@bucket/a, http://h/y?***'"


# ---------------------------------------------------------------- interrupted


def wait_for(path: Path, pattern: str, process: subprocess.Popen, count: int = 1) -> list[Path]:
    while len(found := list(path.glob(pattern))) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return found


def group_is_gone(pid: int) -> bool:
    for _ in range(100):
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def workers_of(pid: int) -> list[int]:
    found = []
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try:
            parent = int(stat.read_text().rpartition(')')[2].split()[1])
            if parent == pid and b'resource_tracker' not in (stat.parent / 'cmdline').read_bytes():
                found.append(int(stat.parent.name))
        except (OSError, ProcessLookupError):
            continue
    return found


@pytest.mark.parametrize('how, status, says', [
    pytest.param('SIGINT to all', 130, 'interrupted: unfinished parts were removed, finished parts stay; to continue, run the '
                 'same command again', marks=pytest.mark.slow),
    pytest.param('SIGTERM', 143, '', marks=pytest.mark.slow),
    pytest.param('SIGKILL to a worker', 1, 'error: --num_workers: a worker process was killed, perhaps because memory ran out',
                 marks=pytest.mark.slow),
], ids=['SIGINT', 'SIGTERM', 'SIGKILL'])
def test_stopped_in_parallel_then_run_again(how: str, status: int, says: str, big: Path, big_whole: dict[str, bytes],
                                            tmp_path: Path) -> None:
    out = tmp_path / 'out'
    with start(out, big, 'train', argv=['--num_workers', '2'], imports=False, TMPDIR=str(tmp_path)) as process:
        wait_for(out / 'train', '[0-9]*', process)
        wait_for(out / 'train', '.*.partial-*', process)
        if how == 'SIGINT to all':
            os.killpg(process.pid, signal.SIGINT)
        elif how == 'SIGTERM':
            process.terminate()
        else:
            os.kill(workers_of(process.pid)[0], signal.SIGKILL)
        _, err = finish(process, status)
    assert says in err
    assert group_is_gone(process.pid)
    assert not list((out / 'train').glob('.*')) and {'out', *os.listdir(tmp_path)} == {'out'}
    parts = {path.name: path.stat().st_mtime_ns for path in (out / 'train').iterdir()}
    assert 0 < len(parts) < 16
    convert(out, big, 'train')
    assert tree(out) == big_whole
    assert {name: (out / 'train' / name).stat().st_mtime_ns for name in parts} == parts, 'what was finished is not made again'


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_20_kills_at_random_moments(big: Path, big_whole: dict[str, bytes], tmp_path: Path) -> None:
    rng, ends, reached = random.Random(3), 0, []
    out = tmp_path / 'out0'
    for kill in range(20):
        left = {*out.glob('train/.*.partial-*/shards')}
        with start(out, big, 'train', argv=['--num_workers', '2'], imports=kill % 3 == 0, TMPDIR=str(tmp_path)) as process:
            if kill % 3:
                more = len(list(out.glob('train/[0-9]*'))) + rng.randrange(4)  # finished parts
                while process.poll() is None and ({*out.glob('train/.*.partial-*/shards')} <= left
                                                  or len(list(out.glob('train/[0-9]*'))) < more):
                    time.sleep(0.01)
                time.sleep(rng.uniform(0, 0.4))
            else:
                time.sleep(rng.uniform(0, 8))
            with suppress(ProcessLookupError):  # it may have come to its end before
                (os.killpg if kill % 2 else os.kill)(process.pid, signal.SIGKILL)
            process.communicate()
        assert group_is_gone(process.pid), 'no worker outlives its parent'
        reached.append(len(list(out.glob('train/[0-9]*'))))
        if (out / 'train/manifest.json').exists():
            finish(start(out, big, 'train', argv=['--num_workers', '2'], imports=False, TMPDIR=str(tmp_path)))
            assert tree(out) == big_whole
            ends += 1
            out = tmp_path / f'out{ends}'
    print('parts after each kill:', reached)
    assert len(set(reached)) > 5
    finish(start(out, big, 'train', argv=['--num_workers', '2'], imports=False, TMPDIR=str(tmp_path)))
    assert tree(out) == big_whole and not list((out / 'train').glob('.*')), 'what the killed runs left is gone'


def test_two_runs_at_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(tmp_path / 'alone', source, 'train')
    write, first = parts._write_part, []

    def slow(job: parts.Job, out: Path) -> dict[str, Any]:
        if not first:  # the other run comes, finishes all, and clears up, while this one is at its first part
            first.append(out)
            convert(tmp_path / 'both', source, 'train')
            assert not out.exists()
        return write(job, out)

    monkeypatch.setattr(parts, '_write_part', slow)
    convert(tmp_path / 'both', source, 'train')
    assert tree(tmp_path / 'both') == tree(tmp_path / 'alone')


def test_containers_of_one_name_leave_each_other_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = subprocess.Popen(['true'])
    dead.wait()
    monkeypatch.setattr(os, 'getpid', lambda: dead.pid)
    mine = output.make_unfinished_folder(tmp_path, '00000')
    with monkeypatch.context() as other:  # the same host, another namespace of process numbers
        other.setattr(storage, 'HOST', f'{storage.HOST}1')
        others = output.make_unfinished_folder(tmp_path, '00001')
    foreign = tmp_path / '.download.partial-1'
    foreign.mkdir()
    output.remove_leftovers(output.open_output(str(tmp_path)))
    assert not mine.exists() and others.exists() and foreign.exists()


# ---------------------------------------------------------------- object stores


@pytest.mark.slow
def test_an_object_store_is_looked_through(s3: Any, source: Path, retries_at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    root = 's3://bucket/404/c4'  # a number that looks like a status
    convert(root, source, 'train')
    whole = objects(s3, '404/c4/')
    s3.delete_object(Bucket='bucket', Key='404/c4/train/00001/shard.00000.mds')
    s3.delete_object(Bucket='bucket', Key='404/c4/train/00002/index.json')
    with pytest.raises(UserError, match='--merge: .*train: 2 of 5 parts are missing: 00001, 00002'):
        convert(root, source, 'train', merge=True)
    for damaged in b'[]', b'{':
        s3.put_object(Bucket='bucket', Key='404/c4/train/00003/part.json', Body=damaged)
        convert(root, source, 'train')
        assert objects(s3, '404/c4/') == whole
    s3.put_object(Bucket='bucket', Key='val-of-others/val/shard.00000.mds', Body=b'precious')
    with pytest.raises(UserError, match='val holds shard.00000.mds, which this program did not write'):
        convert('s3://bucket/val-of-others', source, 'val')
    for damaged in b'[]', b'{', b'{"shards": [1]}':
        s3.put_object(Bucket='bucket', Key='damaged/val/index.json', Body=damaged)
        with pytest.raises(UserError, match='damaged/val holds index.json, which this program did not'):
            convert('s3://bucket/damaged', source, 'val')
    monkeypatch.setenv('S3_ENDPOINT_URL', 'http://127.0.0.1:9')
    output._downloader.cache_clear()
    with pytest.raises(UserError, match='--out_root: cannot read s3://bucket/404/c4/00404/part.json: .*check the address'):
        output.open_output('s3://bucket/404/c4').read('00404/part.json')
    output._downloader.cache_clear()


@pytest.mark.slow
def test_s3_killed_then_in_partitions_holds_what_a_disk_would(s3: Any, big: Path, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    six, temporary = tmp_path / 'six', tmp_path / 'tmp'
    temporary.mkdir()
    shutil.copytree(big, six, ignore=shutil.ignore_patterns('*.000[01][6-9]-*', '*.0001*'))
    convert(tmp_path / 'disk', six, 'train')
    disk = tree(tmp_path / 'disk')
    monkeypatch.setattr('tempfile.tempdir', str(temporary))
    root, found = 's3://bucket/c4', {}
    with start(root, six, 'train', argv=['--num_workers', '2'], TMPDIR=str(temporary)) as process:
        while not any(key.endswith('part.json') for key in found):
            assert process.poll() is None, process.communicate()
            found = objects(s3, 'c4/')
        os.killpg(process.pid, signal.SIGKILL)
        _, err = process.communicate()
    assert 'exists and not empty' not in err
    assert group_is_gone(process.pid) and list(temporary.glob('.workers.partial-*'))
    for part in (key.rpartition('/')[0] for key in found if key.endswith('part.json')):
        assert {k: v for k, v in objects(s3, 'c4/').items() if k.startswith(part)} == \
            {k: v for k, v in disk.items() if k.startswith(part)}, 'part.json comes last'
    for folder in temporary.glob('tmp*'):  # torch's, of the killed process
        shutil.rmtree(folder)
    convert(root, six, 'train', partition='0/2')
    assert os.listdir(temporary) == [], 'what the killed run left is gone'
    s3.delete_object(Bucket='bucket', Key='c4/train/00003/part.json')
    with pytest.raises(UserError, match=r'--merge: s3://bucket/c4/train: \d of 6 parts are missing: .*00003.*; run their'):
        convert(root, six, 'train', merge=True)
    convert(root, six, 'train', partition='1/2')
    convert(root, six, 'train', merge=True)
    assert objects(s3, 'c4/') == disk
    assert os.listdir(temporary) == []
    with pytest.raises(UserError, match="train/00000 was made with compression None, now 'zstd'"):
        convert(root, six, 'train', compression='zstd')


def test_a_bucket_that_cannot_be_used(s3: Any, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.put_object(Bucket='bucket', Key='other/train/index.json',
                  Body=json.dumps({'shards': [{'raw_data': {'basename': 'shard.00000.mds'}, 'zip_data': None}]}).encode())
    with pytest.raises(UserError, match='--out_root: s3://bucket/other/train holds index.json, which this program did'):
        convert('s3://bucket/other', source)
    with pytest.raises(UserError, match='--out_root: cannot write s3://none/x: ClientError: .*Not Found; check the address'):
        convert('s3://none/x', source)
    monkeypatch.delenv('AWS_ACCESS_KEY_ID')
    monkeypatch.setenv('AWS_EC2_METADATA_DISABLED', 'true')
    with pytest.raises(UserError, match='--out_root: cannot write s3://bucket/x: .*[Cc]redentials'):
        convert('s3://bucket/x', source)


# ---------------------------------------------------------------- tokenizers


@pytest.mark.slow
def test_a_tokenizer_trained_on_the_text_is_the_same_in_s3(s3: Any, source: Path, tmp_path: Path, texts: list[str]) -> None:
    from transformers import AutoTokenizer

    both: dict[str, object] = {'train_tokenizer': 300, 'concat_tokens': 64}
    convert(tmp_path / 'c4', source, **both)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / 'c4/tokenizer')
    assert len(tokenizer) == 300 and len(tokenizer(texts[0])['input_ids']) < len(texts[0]) / 1.3, 'merges of this text'
    convert('s3://bucket/c4', source, **both)
    assert objects(s3, 'c4/') == tree(tmp_path / 'c4')
    convert(tmp_path / 'c4', source, **both)
    with pytest.raises(UserError, match=r'--train_tokenizer: 400, but .*/c4/tokenizer was trained with 300; set 300, or delete'):
        convert(tmp_path / 'c4', source, train_tokenizer=400, concat_tokens=64)


def test_a_folder_of_the_users_is_no_place_for_a_trained_tokenizer(source: Path, tmp_path: Path) -> None:
    (tmp_path / 'out/tokenizer').mkdir(parents=True)
    (tmp_path / 'out/tokenizer/vocab.json').write_text('{}')
    (tmp_path / 'file').mkdir()
    (tmp_path / 'file/tokenizer').write_text('{}')
    for out in (tmp_path / 'out', tmp_path / 'file'):
        with pytest.raises(UserError, match=f'--out_root: {out}/tokenizer holds something other than'):
            convert(out, source, 'val', train_tokenizer=300)
    assert tree(tmp_path) == {'file/tokenizer': b'{}', 'out/tokenizer/vocab.json': b'{}'}


def test_a_damaged_record_of_a_trained_tokenizer(tmp_path: Path) -> None:
    (tmp_path / 'tokenizer').mkdir()
    for text in (b'', b'[]', b'{"vocab_size": 3', b'\xff'):
        (tmp_path / 'tokenizer/tokenizer.json').write_text('{}')
        (tmp_path / 'tokenizer/trained.json').write_bytes(text)
        with pytest.raises(UserError, match='--train_tokenizer: .*trained.json is damaged; delete /'):
            write_tokenizer(str(tmp_path), [], 300)


def test_a_tokenizer_beside_the_splits_without_a_config(tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / 'tokenizer').mkdir()
    shutil.copy(tokenizer_dir / 'tokenizer.json', tmp_path / 'tokenizer')
    with pytest.raises(UserError, match='^--tokenizer: .* has no EOS token'):
        load_packing_tokenizer(Namespace(concat_tokens=8, tokenizer=None, out_root=str(tmp_path)), tmp_path)


def test_tokenizers_that_do_not_do(source: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    plain = tmp_path / 'plain'
    shutil.copytree(tokenizer_dir, plain)
    (plain / 'special_tokens_map.json').unlink(missing_ok=True)
    config = json.loads((plain / 'tokenizer_config.json').read_text())
    (plain / 'tokenizer_config.json').write_text(json.dumps({k: v for k, v in config.items() if k != 'eos_token'}))
    for name, message in [(plain, f"--tokenizer: '{plain}' has no EOS token"), ('./none', "--tokenizer: no folder './none'"),
                          (None, '--tokenizer: not set, and there is no .*/out/tokenizer; set')]:
        with pytest.raises(UserError, match=message):
            convert(tmp_path / 'out', source, 'val', concat_tokens=32, **({'tokenizer': name} if name else {}))
    assert os.listdir(tmp_path / 'out') == []


# ---------------------------------------------------------------- other sources


def write_format(path: Path, texts: list[str]) -> None:
    import pyarrow
    from pyarrow import parquet

    data = b'\xef\xbb\xbf' + b'\r\n'.join(json.dumps({'id': i, 'body': text}).encode() for i, text in enumerate(texts))  # Windows
    if path.suffix == '.parquet':
        parquet.write_table(pyarrow.table({'id': list(range(len(texts))), 'body': texts}), path, row_group_size=50)
    elif path.suffix == '.zst':
        half = len(data) // 2  # in two frames, as `cat` joins them
        path.write_bytes(b''.join(pyarrow.compress(part, 'zstd', asbytes=True) for part in (data[:half], data[half:])))
    else:
        path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)


@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz', 'a.jsonl.zst', 'a.parquet'])
def test_other_formats(name: str, texts: list[str], tmp_path: Path) -> None:
    folder = tmp_path / 'my-valid-data'  # a word that is a split's, outside the folder
    (folder / '.cache').mkdir(parents=True)
    (folder / '.cache' / name).write_text('a downloader keeps its notes here')
    write_format(folder / name, texts)
    (folder / f'b.{name.partition(".")[2]}').write_bytes((folder / name).read_bytes())
    convert(tmp_path / 'out', folder, 'train', text_column='body')
    assert [row['text'] for row in read_split(tmp_path / 'out/train')] == texts * 2
    with pytest.raises(UserError, match=rf"^--text_column: .*{name}.* has no (column|field) 'words'; it has: id, body"):
        convert(tmp_path / 'out2', folder, 'train', text_column='words')
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:len(data) * 2 // 3])
    cut = r', line \d+ is not JSON' if name == 'a.jsonl' else r' cannot be read after \w+ \d+: it is cut short'
    with pytest.raises(UserError, match=f'--source: .*{name}{cut}'):
        convert(tmp_path / 'out3', folder, 'train', text_column='body')


def test_a_json_array_is_no_list_of_documents(tmp_path: Path) -> None:
    (tmp_path / 'a.json').write_text(json.dumps([{'text': 'one'}], indent=1))
    with pytest.raises(UserError, match='--source: .*a.json is one JSON array; write one object per line'):
        convert(tmp_path / 'out', tmp_path, 'train')


def test_two_variants_of_c4_in_one_folder_are_refused(source: Path, tmp_path: Path) -> None:
    for variant in 'en', 'realnewslike':
        shutil.copytree(source, tmp_path / 'c4' / variant)
    with pytest.raises(UserError, match='00000-of-01024.json.gz lies in .*c4/en and .*c4/realnewslike; name the folder of one'):
        convert(tmp_path / 'out', tmp_path / 'c4', 'train')
    convert(tmp_path / 'out', tmp_path / 'c4/en', 'train')


def test_splits_are_found_by_a_word_of_the_path(tmp_path: Path) -> None:
    for path, text in ('train/a.jsonl', 'a'), ('wiki_dev.jsonl', 'b'), ('training.jsonl', 'c'):
        write_jsonl(tmp_path / 'in' / path, [text])
    convert(tmp_path / 'out', tmp_path / 'in')
    assert [row['text'] for split in ('train', 'val') for row in read_split(tmp_path / 'out' / split)] == ['a', 'b']


def test_null_text_empty_files_and_long_documents(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import pyarrow
    from pyarrow import parquet
    from streaming import StreamingDataset

    long = 'x' * 3_000_000
    folder = write_jsonl(tmp_path / 'in/a.jsonl', [long, 'short', long]).parent
    (folder / 'b.jsonl').touch()
    parquet.write_table(pyarrow.table({'text': ['one', None, 'three']}), folder / 'c.parquet')
    with pytest.raises(UserError, match=r'^--source: .*c.parquet, row 2 has no string text; .*--skip_bad_docs'):
        convert(tmp_path / 'out', folder, 'train', size_limit='1mb')
    convert(tmp_path / 'out', folder, 'train', size_limit='1mb', skip_bad_docs=True)  # which goes on after a.jsonl
    assert [row['text'] for row in read_split(tmp_path / 'out/train')] == [long, 'short', long, 'one', 'three']
    shards = json.loads((tmp_path / 'out/train/index.json').read_text())['shards']
    assert [shard['samples'] for shard in shards] == [1, 1, 1, 2], 'no empty shard before a long document'
    assert len(list(StreamingDataset(local=str(tmp_path / 'out/train'), batch_size=1))) == 5
    assert manifest(tmp_path / 'out/train')['bad_documents'] == 1
    with pytest.raises(UserError, match='00002 was made with skip_bad_docs True, now False'):
        convert(tmp_path / 'out', folder, 'train', size_limit='1mb')
    out = capsys.readouterr().out
    assert 'skipped: ' in out and 'c.parquet, row 2' in out and '5 documents, 1 skipped, ' in out


def test_bad_documents_are_counted_and_named(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / 'in'
    folder.mkdir()
    good = [json.dumps(row).encode() for row in c4_documents('val', 20)]
    lines = [line for i, row in enumerate(good) for line in ([b'{"text": ', b'', row] if i % 2 else [row])]
    (folder / 'c4-validation.00000-of-00008.json.gz').write_bytes(gzip.compress(b'\n'.join(lines)))
    (folder / 'c4-validation.00001-of-00008.json.gz').write_bytes(gzip.compress(b'[]\n'))
    convert(tmp_path / 'out', folder, 'val', skip_bad_docs=True)
    assert read_split(tmp_path / 'out/val') == c4_documents('val', 20)
    out = capsys.readouterr().out
    assert 'json.gz, line 2 is not JSON' in out and 'json.gz, line 6 is not JSON' in out, 'blank lines count'
    assert out.count('skipped: ') == 5 + 1 and '20 documents, 11 skipped' in out
    assert manifest(tmp_path / 'out/val')['bad_documents'] == 11


def test_unreadable_source(tmp_path: Path) -> None:
    (tmp_path / 'a.jsonl').mkdir()
    with pytest.raises(UserError, match=r'a.jsonl cannot be read after line 0 \(Is a directory\); correct this, then run the same'):
        list(read_documents(tmp_path / 'a.jsonl', ['text']))


# ---------------------------------------------------------------- disks


def test_full_disk(source: Path, tmp_path: Path, small_disk: Path) -> None:  # noqa: F811
    folder = tmp_path / 'in'
    shutil.copytree(source, folder)
    write_file(folder / 'c4-train.00005-of-01024.json.gz', [{**c4_documents('train', 1)[0], 'text': 'x' * 2_000_000}])
    with pytest.raises(UserError, match=f'--out_root: cannot write {small_disk}/train/00005 on {small_disk}/train: No space left '
                                        'on device; the unfinished part.* Free space, then run the same command again'):
        convert(small_disk, folder, 'train')
    parts = [f'{i:05}' for i in range(5)]
    assert sorted(os.listdir(small_disk / 'train')) == parts
    made = tree(small_disk)
    convert(tmp_path / 'roomy', folder, 'train')
    assert made.items() <= tree(tmp_path / 'roomy').items(), 'nothing finished is lost'


@pytest.mark.slow
def test_disk_that_fills_as_the_hub_sends(source: Path, tmp_path: Path, small_disk: Path) -> None:  # noqa: F811
    (small_disk / 'ballast').write_bytes(b'x' * 980_000)
    folder = tmp_path / 'in'
    folder.mkdir()
    rows = [{**c4_documents('val', 1)[0], 'text': os.urandom(200_000).hex()}]
    write_file(folder / 'c4-train.00000-of-01024.json.gz', c4_documents('train', 1))
    write_file(folder / 'c4-validation.00000-of-00008.json.gz', rows)
    with HubServer(folder) as hub:
        began = time.monotonic()
        _, err = finish(start(small_disk, 'hub', 'val', argv=['--skip_disk_check'], **hub.env(tmp_path / 'cache')), 1)
    assert 'error: --out_root: cannot write' in err and 'No space left on device' in err and time.monotonic() - began < 60


def test_disk_that_is_too_small_is_said_at_once(source: Path, tmp_path: Path, small_disk: Path) -> None:  # noqa: F811
    folder = write_jsonl(tmp_path / 'in/a.jsonl', ['x' * 2_000_000]).parent
    with pytest.raises(UserError, match=r'--out_root: .*/disk has 0.001 GB free; the 1 files still to convert need about '
                                        '0.002 GB. Free space, name another disk, or add --compression zstd; --skip_disk_check'):
        convert(small_disk, folder, 'train')
    assert os.listdir(small_disk) == []
    write_jsonl(folder / 'a.jsonl', ['short', 'x' * 2_000_000])
    convert(small_disk, folder, 'train', max_docs=1)


# ---------------------------------------------------------------- what is there already


def test_other_options_or_another_source(source: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / 'in', tmp_path / 'out'
    shutil.copytree(source, folder)
    convert(out, folder, 'train')
    before = tree(out)

    def refused(message: str, **options: object) -> None:
        with pytest.raises(UserError, match=message):
            convert(out, folder, 'train', **options)
        assert tree(out) == before

    refused(r"--out_root: .*train/00000 was made with hashes \[\], now \['sha1'\]; use the same options \(and --revision\) to continue",
            hashes='sha1')
    data = (folder / 'c4-train.00002-of-01024.json.gz').read_bytes()
    (folder / 'c4-train.00002-of-01024.json.gz').write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # of the same size
    refused(r"train/00002 was made with file 'c4-train.00002-of-01024.json.gz \(\d+ bytes \w+\)', now 'c4-train.00002")
    (folder / 'c4-train.00002-of-01024.json.gz').write_bytes(data)
    (folder / 'c4-train.00004-of-01024.json.gz').rename(tmp_path / 'away')
    refused('train holds the part 00004, but the source has only 4 files for this split: the parts were made from another')
    (tmp_path / 'away').rename(folder / 'c4-train.00004-of-01024.json.gz')
    shutil.move(folder, tmp_path / 'elsewhere')
    with pytest.raises(UserError, match='neither hub nor sample nor a FOLDER'):
        convert(out, folder, 'train')
    convert(out, tmp_path / 'elsewhere', 'train')
    assert {**tree(out), 'train/manifest.json': b''} == {**before, 'train/manifest.json': b''}


@pytest.mark.parametrize('names, message', [
    (['index.json', 'shard.00000.mds'], '/train holds shard.00000.mds, which this program did not write'),
    (['index.json'], '/train holds index.json, which this program did not write'),
    (['notes.txt'], '/train holds notes.txt, which this program did not write'),
    (['00000/shard.00000.mds'], '/train/00000 holds no part.json, so this program did not finish it; delete it'),
])
def test_other_data_is_refused_and_left_alone(names: list[str], message: str, source: Path, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / 'out/train' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'out/train' / name).write_text('precious')
    with pytest.raises(UserError, match=message):
        convert(tmp_path / 'out', source)
    assert tree(tmp_path / 'out') == {f'train/{name}': b'precious' for name in names}


def test_merge_before_the_parts_are_done(source: Path, tmp_path: Path) -> None:
    convert(tmp_path, source, 'train', partition='1/2')
    with pytest.raises(UserError, match='--merge: .*train: 3 of 5 parts are missing: 00000, 00002, 00004; run their --partition'):
        convert(tmp_path, source, 'train', merge=True)
    convert(tmp_path, source, 'val', partition='6/7')  # more partitions than files
    assert not (tmp_path / 'val').exists() or os.listdir(tmp_path / 'val') == []


# ---------------------------------------------------------------- verify


def test_verify_names_what_is_damaged_and_the_same_command_mends_it(source: Path, tmp_path: Path) -> None:
    convert(tmp_path / 'made', source, compression='zstd')
    shutil.copytree(tmp_path / 'made', tmp_path / 'copy')
    copy = tmp_path / 'copy/train'
    assert verify(str(tmp_path / 'copy')) == verify(str(copy)) == []
    cut, flipped, lost = (copy / f'{i:05}/shard.00000.mds.zstd' for i in (1, 2, 3))
    data = flipped.read_bytes()
    flipped.write_bytes(data[:50] + bytes([data[50] ^ 4]) + data[51:])
    cut.write_bytes(cut.read_bytes()[:-1])
    lost.unlink()
    (copy / 'index.json').write_text('{')
    size, index = cut.stat().st_size, (tmp_path / 'made/train/index.json').stat().st_size
    assert verify(str(tmp_path / 'copy')) == [
        f'{copy}/index.json: 1 bytes, should be {index:,}', f'{cut}: {size:,} bytes, should be {size + 1:,}',
        f'{flipped}: its contents have changed (xxh128)', f'{lost}: missing']
    done = subprocess.run([sys.executable, 'convert_c4.py', '--verify', str(tmp_path / 'copy')], cwd=REPO, text=True,
                          capture_output=True)
    assert done.returncode == 1 and done.stderr.startswith('error: --verify: 4 damaged\n') and str(lost) in done.stderr
    assert 'Delete the subfolder of each damaged file, such as train/00012, then run the command' in done.stderr
    assert f'{tmp_path}/copy/val: 90 documents in 3 files: whole' in done.stdout
    shutil.rmtree(flipped.parent)  # what changed without a change of size, only its hash tells
    (copy / '00004/part.json').write_text('')
    convert(tmp_path / 'copy', source, compression='zstd')
    assert tree(tmp_path / 'copy') == tree(tmp_path / 'made')
    (copy / 'manifest.json').write_text('{')
    with pytest.raises(UserError, match='--verify: .*manifest.json is damaged .*; run the command that made the split'):
        verify(str(copy))
    for files in ('[]', '{"a": {}}', '{"a": 3}'):
        (copy / 'manifest.json').write_text(f'{{"documents": 1, "files": {files}}}')
        with pytest.raises(UserError, match='--verify: .*manifest.json is damaged'):
            verify(str(copy))
    (copy / 'manifest.json').unlink()
    assert verify(str(tmp_path / 'copy')) == [f'{copy}: has no manifest.json, so it was not finished']
    with pytest.raises(UserError, match='--verify: .* holds no SPLIT/manifest.json, so this program did not finish a split there'):
        verify(str(tmp_path))


def test_verify_covers_the_tokenizer_and_a_split_of_one_part(source: Path, tmp_path: Path) -> None:
    convert(tmp_path, source, 'val', train_tokenizer=300)
    assert verify(str(tmp_path)) == []
    whole = tree(tmp_path)
    tokenizer = tmp_path / 'tokenizer/tokenizer.json'
    tokenizer.write_text(tokenizer.read_text().replace('e', 'f', 1))
    (tmp_path / 'val/00000/shard.00000.mds').unlink()
    assert verify(str(tmp_path)) == [f'{tmp_path}/val/00000/shard.00000.mds: missing',
                                     f'{tokenizer}: its contents have changed (xxh128)']
    shutil.rmtree(tmp_path / 'val/00000')  # as it is told to, and the only part
    shutil.rmtree(tmp_path / 'tokenizer')
    convert(tmp_path, source, 'val', train_tokenizer=300)
    assert tree(tmp_path) == whole


def test_train_small_trains_the_tokenizer_before_the_machines_share_train(source: Path, tmp_path: Path,
                                                                          capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match='--partition: .* a tokenizer of its own; run --splits train_small --train_tokenizer'):
        convert(tmp_path, source, 'train', train_tokenizer=300, partition='0/2')
    convert(tmp_path / 'alone', source, 'train', train_tokenizer=300)
    convert(tmp_path, source, 'val', 'train_small', train_tokenizer=300)
    assert tree(tmp_path / 'tokenizer') == tree(tmp_path / 'alone/tokenizer'), 'of train, not of val'
    for how in {'partition': '0/2'}, {'partition': '1/2'}, {'merge': True}:
        convert(tmp_path, source, 'train', concat_tokens=32, **how)
    capsys.readouterr()
    convert(tmp_path / 'named', source, 'val', concat_tokens=32, tokenizer=tmp_path / 'tokenizer')
    assert f'--max_seq_len 32 --tokenizer {tmp_path}/tokenizer\n' in capsys.readouterr().out


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize('argv, message', [
    (['--partition', '3/3'], "--partition: '3/3' is not i/n with 0 <= i < n, such as 0/4"),
    (['--partition', '1'], "--partition: '1' is not i/n"),
    (['--num_workers', '0'], "--num_workers: '0' is not a whole number above 0"),
    (['--max_docs', 'ten'], "--max_docs: 'ten' is not a whole number above 0"),
    (['--out_root', ''], '--out_root: the name of a folder is missing'),
    (['--verify', 'x'], '--verify: not allowed with argument --out_root'),
])  # fmt: skip
def test_arguments_that_cannot_be_read(argv: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    import convert_c4
    with pytest.raises(SystemExit):
        convert_c4.parse_args(['--out_root', 'x', *argv])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('options, message', [
    ({'compression': 'zstd:99'}, "--compression: 'zstd:99' is not known; set one of .*zstd:7"),
    ({'hashes': 'sha1 md6'}, "--hashes: 'md6' is not known; set one of .*md5"),
    ({'size_limit': '5gb'}, "--size_limit: '5gb' is not a size below 4gb; set one such as 64mb, or a number of bytes"),
    ({'size_limit': '0'}, "--size_limit: '0' is not a size below 4gb"),
    ({'size_limit': 'big'}, "--size_limit: 'big' is not a size below 4gb"),
    ({'tokenizer': 'gpt2'}, '--tokenizer: gpt2 is not used for text; add --concat_tokens N'),
    ({'concat_tokens': 1}, '--concat_tokens: 1 leaves nothing to predict'),
    ({'partition': '0/2', 'merge': True}, '--merge: does not go with --partition; when every --partition is done, run'),
    ({'merge': True, 'max_docs': 5}, '--merge: --max_docs and train_small are converted without --partition; leave'),
    ({'partition': '0/2', 'max_docs': 5}, '--partition: --max_docs and train_small are converted on one machine; leave'),
    ({'partition': '0/2', 'train_tokenizer': 300}, '--partition: with --train_tokenizer each machine would train a tokenizer'),
    ({'train_tokenizer': 300, 'concat_tokens': 8, 'tokenizer': 'gpt2'}, '--train_tokenizer: --tokenizer names an existing tokenizer; leave'),
    ({'train_tokenizer': 256}, '--train_tokenizer: 256 must be at least 257'),
    ({'config': 'en'}, '--dataset, --config, --revision: only for --source hub, but --source is '),
])  # fmt: skip
def test_options_that_do_not_go_together(options: dict[str, object], message: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        convert(tmp_path / 'out', source, **options)
    assert not (tmp_path / 'out').exists()

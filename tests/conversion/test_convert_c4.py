"""convert_c4 converts files and the sample unchanged; it reports bad files, and leaves no unfinished part."""

import functools
import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import tqdm
from launch import Popen, clean_env

import convert_c4
from src.common.errors import UserError
from src.conversion import sample_corpus

REPO = Path(__file__).parents[2]
Documents = list[dict[str, str]]


def c4_documents(split: str, count: int, first: int = 0) -> Documents:
    return [{'text': f'{split} {i}: naïve “quotes” 日本 🙂\nsecond line\t' + 'word ' * (i % 7),
             'timestamp': f'2019-04-{1 + i % 28:02}T12:{i % 60:02}:54Z',
             'url': f'https://example.com/{split}/{i}'} for i in range(first, first + count)]  # fmt: skip


def write_file(path: Path, documents: Documents) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(b''.join(json.dumps(document).encode() + b'\n' for document in documents)))


def read_split(folder: Path) -> Documents:
    from streaming import LocalDataset
    dataset = LocalDataset(local=str(folder))
    return [dict(dataset[i]) for i in range(len(dataset))]


def fingerprint(documents: Documents) -> tuple[int, int]:
    """Count and order-independent hash."""
    lines = (json.dumps(document, sort_keys=True).encode() for document in documents)
    return len(documents), sum(int(hashlib.sha256(line).hexdigest(), 16) for line in lines)


def convert(out_root: object, source: object, *splits: str, **options: object) -> None:
    """Runs the conversion in this process; `compression='zstd'` is --compression zstd, and True is a flag."""
    argv = ['--out_root', str(out_root), '--source', str(source), '--num_workers', '1']
    argv += ['--splits', *splits] if splits else []
    for name, value in options.items():
        argv += [f'--{name}', *([] if value is True else str(value).split())]
    convert_c4.main(convert_c4.parse_args(argv))


def start(out_root: object, source: object, *splits: str, argv: Sequence[str] = (), imports: bool = True,
          **env: str) -> subprocess.Popen:
    """Starts the program in a process group of its own; without `imports` all libraries are imported, and no bar is shown."""
    command = [sys.executable, 'convert_c4.py', '--out_root', str(out_root), '--source', str(source), '--splits', *splits, *argv]
    if not imports:
        return Popen(command, cwd=REPO, env=clean_env(**env), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                     start_new_session=True)
    inherited = {name: value for name, value in os.environ.items() if name != 'TQDM_DISABLE'}
    return subprocess.Popen(command, cwd=REPO, env={**inherited, **env}, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True,
                            # a test run in the background inherits an ignored SIGINT
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))


@pytest.fixture
def c4_folder(tmp_path: Path) -> Path:
    """Three train files and one validation file, named as C4's, with 50 documents each."""
    folder = tmp_path / 'c4'
    for i in range(3):
        write_file(folder / f'c4-train.{i:05}-of-01024.json.gz', c4_documents('train', 50, 50 * i))
    write_file(folder / 'c4-validation.00000-of-00008.json.gz', c4_documents('val', 50))
    return folder


@pytest.fixture(scope='module')
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole sample, converted once for all tests that read it."""
    out_root = tmp_path_factory.mktemp('sample') / 'out'
    convert(out_root, 'sample')
    return out_root


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', str(disk)], capture_output=True).returncode:
        pytest.skip('needs the right to mount a tmpfs')
    yield disk
    subprocess.run(['umount', '-l', str(disk)], check=True)


def test_folder_is_converted_in_order(c4_folder: Path, tmp_path: Path,
                                      capsys: pytest.CaptureFixture) -> None:
    convert(tmp_path / 'out', c4_folder)
    train = c4_documents('train', 150)
    assert read_split(tmp_path / 'out/train') == train
    assert read_split(tmp_path / 'out/val') == c4_documents('val', 50)
    assert sorted(os.listdir(tmp_path / 'out')) == ['train', 'val']
    out = capsys.readouterr().out
    size = sum(len(document['text'].encode()) for document in train)
    assert f'{tmp_path}/out/train: 150 documents, {size:,} bytes of text, ' in out
    assert 'train: 3 of the 1,024 files of C4' in out
    assert not list((tmp_path / 'out').rglob('.*'))


def test_progress_bar_counts_to_all_of_c4_only_for_all_files_of_c4(c4_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('src.conversion.pool.tqdm', functools.partial(tqdm.tqdm, disable=False))
    for i in range(8):
        write_file(c4_folder / f'c4-validation.{i:05}-of-00008.json.gz', c4_documents('val', 2, 2 * i))
    convert(tmp_path / 'out', c4_folder, 'val', 'train')
    out, err = capsys.readouterr()
    assert '16.0/365k' in err
    assert 'note: C4 has 364,608 documents in val; the source has 16' in out
    assert 'train: 150 documents [' in err and '/365M' not in err
    assert read_split(tmp_path / 'out/val') == c4_documents('val', 16)
    convert(tmp_path / 'out', c4_folder, 'val')
    out, err = capsys.readouterr()
    assert 'val: 8 of 8 parts are already finished' in out and '16.0/365k' in err and '/s' in err


@pytest.mark.parametrize('splits', [['validation'], ['train', 'test']], ids=' '.join)
def test_unknown_split(splits: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        convert_c4.parse_args(['--out_root', 'out', '--splits', *splits])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert '--splits' in message and repr(splits[-1]) in message and 'train' in message and 'val' in message


def test_all_of_c4_from_the_hub_on_all_cores_by_default() -> None:
    args = convert_c4.parse_args(['--out_root', 'out'])
    assert (args.splits, args.source, args.dataset) == (['train', 'val'], 'hub', 'allenai/c4')
    assert args.num_workers == len(os.sched_getaffinity(0))
    assert not (args.partition or args.merge or args.compression or args.hashes or args.concat_tokens or args.max_docs)


def test_misspelt_source_is_one_line_at_once(tmp_path: Path) -> None:
    (tmp_path / 'streaming.py').write_text('raise SystemExit("streaming is imported")')
    with start(tmp_path / 'out', 'sampel', 'val', PYTHONPATH=str(tmp_path)) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith('error: --source: sampel is neither hub nor sample nor a FOLDER that exists') and err.count('\n') == 1


def test_folder_without_files_of_the_split(tmp_path: Path) -> None:
    write_file(tmp_path / 'c4/c4-train.00000-of-01024.json.gz', c4_documents('train', 2))
    with pytest.raises(UserError, match=r'c4 holds no files for the split val: expected c4-validation\.\*\.json\.gz, or the '
                                        r'word validation or valid or val or dev in the path.*leave the split out of --splits'):
        convert(tmp_path / 'out', tmp_path / 'c4', 'train', 'val')
    assert os.listdir(tmp_path / 'out') == []  # not even train: everything is checked first


def test_empty_folder_of_a_split_is_filled(c4_folder: Path, tmp_path: Path) -> None:
    (tmp_path / 'out/val').mkdir(parents=True)
    convert(tmp_path / 'out', c4_folder, 'val')
    assert read_split(tmp_path / 'out/val') == c4_documents('val', 50)


@pytest.mark.parametrize('out_root, message', [
    ('file', 'is a file or cannot be written'),
    ('file/below', 'is a file or cannot be written'),
    ('with', 'is a file or cannot be written'),
    ('link', 'cannot be made .*; name a folder that can be written'),
    ('s4://bucket/c4', 'must be a folder, or a URL with a bucket and one of s3://, gs://'),
    ('s3://', 'must be a folder, or a URL with a bucket and one of s3://, gs://'),
])  # fmt: skip
def test_out_root_that_cannot_be_a_folder(out_root: str, message: str, c4_folder: Path, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path('file').write_text('precious')
    Path('with').mkdir()
    Path('with/val').write_text('')
    Path('link').symlink_to('gone/far')
    with pytest.raises(UserError, match=f'--out_root: .*(file|with/val|{out_root}).* {message}'):
        convert(out_root, c4_folder)
    assert Path('file').read_text() == 'precious'
    assert sorted(os.listdir()) == ['c4', 'file', 'link', 'with']


GOOD = json.dumps(c4_documents('train', 1)[0]).encode() + b'\n'
BAD_FILES = {
    'cut gzip': (gzip.compress(os.urandom(500).hex().encode() * 9)[:-20], 'cannot be read after line 0: .*cut short'),
    'no bytes': (b'', 'cannot be read after line 0: .*it is empty'),
    'no gzip': (GOOD, 'cannot be read after line 0: .*Not a gzipped file'),
    'flipped bits': (gzip.compress(GOOD * 2)[:40] + b'\xff' * 40 + gzip.compress(GOOD * 2)[80:], 'cannot be read after line'),
    'not JSON': (gzip.compress(GOOD * 2 + b'{"text": \n' + GOOD), 'line 3 is not JSON'),
    'not UTF-8': (gzip.compress(GOOD + b'{"text": "\xff"}\n'), 'line 2 is not JSON'),
    'a list': (gzip.compress(GOOD + b'\n[1]\n'), 'line 3 has no string text, timestamp, url'),
    'nested too deep': (gzip.compress(b'[' * 10**5), 'line 1 is not JSON'),
    'text is a number': (gzip.compress(GOOD + b'{"text": 1, "timestamp": "", "url": ""}\n'), 'line 2 has no string text;'),
    'no url': (gzip.compress(GOOD + b'{"text": "", "timestamp": ""}\n'), 'line 2 has no string url;'),
    'half a surrogate': (gzip.compress(GOOD + b'{"text": "\\ud800", "timestamp": "", "url": ""}\n'),
                         'line 2 holds characters that are not Unicode'),
    'empty': (gzip.compress(b''), 'there are no documents for train'),
}


@pytest.mark.parametrize('data, message', BAD_FILES.values(), ids=list(BAD_FILES))
def test_bad_file_is_named_with_its_line(data: bytes, message: str, c4_folder: Path, tmp_path: Path) -> None:
    convert(tmp_path / 'out', c4_folder, 'val')
    bad = c4_folder / 'c4-train.00001-of-01024.json.gz'
    bad.write_bytes(data)
    if 'no documents' in message:
        for other in set(c4_folder.glob('c4-train*')) - {bad}:
            other.unlink()
        where = '--source: '
    else:
        where = f'--source: {bad}.*'
    with pytest.raises(UserError, match=where + message):
        convert(tmp_path / 'out', c4_folder, 'train')
    assert os.listdir(tmp_path / 'out/train') == ['00000'], 'what was finished stays, and nothing else'
    assert read_split(tmp_path / 'out/val') == c4_documents('val', 50)


def test_gzip_cut_at_its_end_names_one_of_the_last_lines(c4_folder: Path, tmp_path: Path) -> None:
    cut = c4_folder / 'c4-validation.00000-of-00008.json.gz'
    cut.write_bytes(cut.read_bytes()[:-8])  # all the data, but neither checksum nor length
    with pytest.raises(UserError, match=f'{cut} cannot be read after line (4[0-9]|50): it is cut short or damaged'):
        convert(tmp_path / 'out', c4_folder, 'val')
    assert os.listdir(tmp_path / 'out/val') == []


def test_full_disk_under_the_tokenizer(small_disk: Path) -> None:
    (small_disk / 'ballast').write_bytes(b'x' * 1_000_000)
    texts = [f'{i:x} words {i * i:x}' for i in range(5000)]
    with pytest.raises(UserError, match='cannot write .*/tokenizer on .*: No space left on device'):
        convert_c4.write_tokenizer(str(small_disk), texts, 4096)
    assert os.listdir(small_disk) == ['ballast']


def test_disk_that_is_mounted_read_only(c4_folder: Path, small_disk: Path) -> None:
    subprocess.run(['mount', '-o', 'remount,ro', str(small_disk)], check=True)
    with pytest.raises(UserError, match='--out_root: .*disk is a file or cannot be written; change its permissions, or name another'):
        convert(small_disk, c4_folder, 'val')


PARAGRAPHS = {
    'wrapped lines are joined': ('One sentence that is\n    wrapped over two lines, as docstrings are, ends here.',
                                 ['One sentence that is wrapped over two lines, as docstrings are, ends here.']),
    'a parameter keeps its description': (
        'Args:\n    size (int): The number of documents that are read at once from the disk.\n    x (int): Short.',
        ['The number of documents that are read at once from the disk.']),
    'a numpy parameter too': (
        'Parameters\n----------\nn : int, optional\n    The number of documents that are read at once from the disk.',
        ['The number of documents that are read at once from the disk.']),
    'markup goes': ('The class :class:`~torch.Tensor` and ``x`` are **named** here without any of the marks around them.',
                    ['The class torch.Tensor and x are named here without any of the marks around them.']),
    'a doctest goes': ('>>> Print this long line of many words so that it would be prose if not for the marks.', []),
    'code goes': ('x = torch.zeros(3, 4); y = x[0]; z = {a: b for a, b in zip(x, y)}; foo(x)[1:2] = bar | baz.', []),
    'a table goes': (
        'Name      Meaning of it all\nfoo       The number of words in the line.\nbar       Another one of the lot.', []),
}  # fmt: skip


@pytest.mark.parametrize('text, expected', PARAGRAPHS.values(), ids=list(PARAGRAPHS))
def test_paragraphs_of_a_docstring(text: str, expected: list[str]) -> None:
    assert list(sample_corpus.paragraphs(text)) == expected


@pytest.mark.slow
def test_sample_has_enough_prose_and_no_paragraph_twice(sample: Path) -> None:
    train, val = read_split(sample / 'train'), read_split(sample / 'val')
    size = {split: sum(len(document['text']) for document in documents) for split, documents in (('train', train), ('val', val))}
    assert size['train'] > 4_000_000
    assert 0.04 < size['val'] / (size['train'] + size['val']) < 0.1
    paragraphs = [line for document in train + val for line in document['text'].split('\n')]
    assert len(set(paragraphs)) == len(paragraphs)  # so train and val share none
    sentences = {split: {sentence for document in documents for sentence in re.split(r'\n|(?<=[.!?:;]) ', document['text'])
                         if len(sentence) >= 60} for split, documents in (('train', train), ('val', val))}  # fmt: skip
    assert len(sentences['val']) > 2000 and sentences['val'].isdisjoint(sentences['train'])
    assert all(sample_corpus.is_prose(line) for line in paragraphs)
    assert min(len(document['text']) for document in train + val) >= 200
    assert len({document['url'] for document in train + val}) == len(train + val)
    assert {document['timestamp'] for document in train + val} == {'2019-04-25T00:00:00Z'}
    for documents in train, val:  # English: its commonest word, and about as often as in English
        words = Counter(word for document in documents for word in document['text'].split())
        assert words.most_common(1)[0][0] == 'the' and 0.04 < words['the'] / words.total() < 0.12


@pytest.mark.slow
def test_sample_from_a_folder_gives_the_same_documents(sample: Path, tmp_path: Path) -> None:
    for split, name in ('train', 'train.00000-of-01024'), ('val', 'validation.00000-of-00008'):
        write_file(tmp_path / f'c4/c4-{name}.json.gz', read_split(sample / split))
    convert(tmp_path / 'out', tmp_path / 'c4')
    for split in 'train', 'val':
        assert fingerprint(read_split(tmp_path / 'out' / split)) == fingerprint(read_split(sample / split))


@pytest.mark.slow
def test_sample_tokenizer(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    tokenizer = AutoTokenizer.from_pretrained(str(sample / 'tokenizer'))
    assert len(tokenizer) == tokenizer.vocab_size == 4096
    assert sorted(tokenizer.get_vocab().values()) == list(range(4096))
    assert {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token, tokenizer.pad_token} == {'<|endoftext|>'}
    assert tokenizer.eos_token_id == 0
    assert tokenizer.model_max_length > 10**9
    odd = ['', ' leading', 'two  spaces , kept', 'naïve 日本 🙂\x00\r\n\ttab']
    for text in odd + [document['text'] for document in read_split(sample / 'val')]:
        ids = tokenizer(text)['input_ids']
        assert tokenizer.decode(ids) == text
    val = '\n'.join(document['text'] for document in read_split(sample / 'val'))
    assert len(val.encode()) / len(tokenizer(val)['input_ids']) > 3.5  # merges were learnt: bytes alone give 1
    assert tokenizer('a<|endoftext|>b')['input_ids'][1] == tokenizer.eos_token_id


def corpus_and_tokenizer(folder: Path) -> str:
    corpus = sample_corpus.gather_sample(max_bytes=1_000_000)
    folder.mkdir()
    sample_corpus.train_tokenizer((document['text'] for document in corpus['train']), folder)
    files = b''.join(path.read_bytes() for path in sorted(folder.iterdir()))
    return hashlib.sha256(json.dumps(corpus).encode() + files).hexdigest()


@pytest.mark.slow
def test_sample_and_tokenizer_are_the_same_in_every_run(tmp_path: Path) -> None:
    here = corpus_and_tokenizer(tmp_path / 'here')
    code = ('import sys; from pathlib import Path; from test_convert_c4 import corpus_and_tokenizer; '
            'print(corpus_and_tokenizer(Path(sys.argv[1])))')
    env = {**os.environ, 'PYTHONPATH': f'{REPO}:{REPO}/tests:{REPO}/tests/conversion', 'PYTHONHASHSEED': '1234', 'LC_ALL': 'C', 'TZ': 'Asia/Tokyo'}
    there = subprocess.run([sys.executable, '-c', code, str(tmp_path / 'there')], cwd=tmp_path, env=env, text=True,
                           capture_output=True, check=True)
    assert there.stdout.strip() == here


def test_sample_keeps_a_tokenizer_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sample_corpus, 'gather_sample', lambda: {'train': c4_documents('train', 9), 'val': c4_documents('val', 3)})
    convert(tmp_path / 'out', 'sample', 'val')
    first = (tmp_path / 'out/tokenizer/tokenizer.json').read_text()
    assert 'Ġ30' not in first and 'rain' in json.loads(first)['model']['vocab']  # from train, although only val was asked for
    monkeypatch.setattr(sample_corpus, 'gather_sample', lambda: {'train': c4_documents('other', 9), 'val': []})
    convert(tmp_path / 'out', 'sample', 'train')
    assert (tmp_path / 'out/tokenizer/tokenizer.json').read_text() == first
    assert sorted(os.listdir(tmp_path / 'out')) == ['tokenizer', 'train', 'val']
    out = capsys.readouterr().out
    assert f'{tmp_path}/out/tokenizer: kept, because it exists' in out
    assert out.endswith(f'next: composer main.py yamls/quickstart.yaml data_remote={tmp_path}/out\n')
    monkeypatch.chdir(tmp_path)
    convert(Path('./my-copy-c4'), 'sample', 'train')
    assert capsys.readouterr().out.endswith('next: composer main.py yamls/quickstart.yaml\n')


def test_hub_that_nobody_answers_for(tmp_path: Path) -> None:
    with start(tmp_path / 'out', 'hub', 'val', HF_ENDPOINT='http://user:key@127.0.0.1:9', HF_HOME=str(tmp_path / 'cache'),
               NO_PROXY='127.0.0.1', HF_HUB_OFFLINE='0', HF_DATASETS_OFFLINE='0') as process:  # fmt: skip
        err = process.communicate(timeout=90)[1]
    assert process.returncode == 1
    assert 'Traceback' not in err
    message = err[err.index('error: '):]
    assert message.startswith('error: --source hub: cannot reach allenai/c4 en on the hub: check the network, HF_ENDPOINT '
                              '(http://***@127.0.0.1:9)')  # fmt: skip
    assert '--source FOLDER' in message and '--source sample' in message
    assert 'user:key' not in err


def test_help_does_not_import_the_heavy_libraries() -> None:
    command = [sys.executable, '-X', 'importtime', 'convert_c4.py', '--help']
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and 'hub|sample|FOLDER' in done.stdout
    assert not any(f' {name}\n' in done.stderr for name in ('streaming', 'datasets', 'torch', 'transformers'))

"""Bad documents are read correctly or reported; --skip_bad_docs leaves out documents, never a whole file."""

import argparse
import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_conversion import manifest, write_jsonl
from test_convert_c4 import REPO, convert, read_split

import convert_c4
from src.common.errors import UserError
from src.conversion.documents import _as_text
from src.conversion.shards import pack_tokens


def texts(split: Path) -> list[object]:
    return [row['text'] for row in read_split(split)]


def zst_frame(data: bytes, window_log: int) -> bytes:
    """A zstd frame of one block, not compressed, with a window of 2**window_log bytes (RFC 8878, section 3.1.1)."""
    return b'\x28\xb5\x2f\xfd\x00' + bytes([window_log - 10 << 3]) + (len(data) << 3 | 1).to_bytes(3, 'little') + data


def test_zstd_windows_above_128_mb(tmp_path: Path) -> None:
    text = b''.join(json.dumps({'text': f'{i}'}).encode() + b'\n' for i in range(200))
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in/a.jsonl.zst').write_bytes(zst_frame(text[:1000], 20) + zst_frame(text[1000:], 31))
    with pytest.raises(UserError, match='a.jsonl.zst has a zstd window of more than 128 MB, .*; unpack the file'):
        convert(tmp_path / 'out', tmp_path / 'in', 'train', skip_bad_docs=True)


WHOLE = {
    'an array in one line': ('[{"text": "a"}, {"text": "b"}]', 'b.json is one JSON array; write one object per line'),
    'an element a line': ('[{"text": "a"},\n{"text": "b"}]', 'b.json is one JSON array'),
    'an array after blank lines': ('\n \n[{"text": "a"}]\n', 'b.json is one JSON array'),
    'an array after a byte order mark': ('\ufeff[{"text": "a"}]', 'b.json is one JSON array'),
    'an array of strings': ('["a", "b"]', 'b.json is one JSON array'),
    'an array after a document': ('{"text": "a"}\n[{"text": "b"}]', 'b.json, line 2 is one JSON array'),
    'documents in an object': ('{"v": 1, "data": [{"text": "a"}]}', "b.json is one JSON object with a list 'data';"),
    'an object over several lines': ('{\n "text": "a"\n}', 'b.json is JSON over several lines; write one object per line'),
    'no document can be used': ('{"text": 1}\n{"text": null}\n{}', 'line 1 has no string text; .*; none of the doc'),
    'columns of pandas': ('{"text": {"0": "a", "1": "b"}}', 'line 1 has no string text; .* one object per line .df.to_json'),
    'columns of lists': ('{"text": ["a", "b"]}', 'one object per line .df.to_json.*; none of the documents of this file'),
    'documents on one line': ('{"text": "a"}{"text": "a"}', 'line 1 is not JSON .Extra data: .* one object per line'),
    'line ends of old Macs': ('{"text": "a"}\r{"text": "b"}\r', 'line 1 is not JSON .Extra data: .* one object per line'),
    'text in another field': ('{"body": "a"}\n{"body": "b"}', "text_column: .* no field 'text'; it has: body; none of"),
}


@pytest.mark.parametrize('data, message', WHOLE.values(), ids=list(WHOLE))
def test_a_file_is_not_left_out_as_a_bad_document(data: str, message: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / 'in/a.jsonl', ['good'])
    (tmp_path / 'in/b.json').write_bytes(data.encode())
    with pytest.raises(UserError, match=message):
        convert(tmp_path / 'out', tmp_path / 'in', 'train', skip_bad_docs=True)


@pytest.mark.parametrize('data', [gzip.compress(b'{}'), zst_frame(b'{}', 20), bytes(9)], ids=['gzip', 'zstd', 'zeros'])
@pytest.mark.parametrize('name', ['b.jsonl', 'b.json.gz'])
def test_files_that_hold_no_text(name: str, data: bytes, tmp_path: Path) -> None:
    write_jsonl(tmp_path / 'in/a.jsonl', ['good'])
    (tmp_path / 'in' / name).write_bytes(gzip.compress(data) if name.endswith('.gz') else data)
    with pytest.raises(UserError, match=f'{name} is not text: it is damaged, or its name lacks the ending of its'):
        convert(tmp_path / 'out', tmp_path / 'in', 'train', skip_bad_docs=True)


@pytest.mark.parametrize('encoding', ['utf-16', 'utf-16-le', 'utf-16-be', 'utf-32'])
@pytest.mark.parametrize('name', ['a.jsonl', 'a.txt'])
def test_files_that_are_not_utf_8(name: str, encoding: str, tmp_path: Path) -> None:
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / name).write_text('{"text": "a"}\n{"text": "b"}\n', encoding)
    with pytest.raises(UserError, match=f'{name} is UTF-16 or UTF-32 text; write it as UTF-8'):
        convert(tmp_path / 'out', tmp_path / 'in', 'train', skip_bad_docs=True)


def test_strings_that_are_not_unicode_are_bad_documents(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import pyarrow
    from pyarrow import parquet

    (tmp_path / 'in').mkdir()
    lines = [b'\xef\xbb\xbf{"text": "one"}', b'', b'{"text": "\\ud800"}', b'{"\\ud800": "x"}', b'{"text": "\xff"}',
             b'{"text": "two"}']
    (tmp_path / 'in/a.jsonl').write_bytes(b'\r\n'.join(lines))
    parquet.write_table(pyarrow.table({'text': [['a']]}), tmp_path / 'in/lists.parquet')
    values = [b'three', b'\xff', None, 'vier\u00e9'.encode()]
    kinds = pyarrow.binary(), pyarrow.string(), pyarrow.large_string(), pyarrow.string()
    for name, kind in zip('bcde', kinds):
        binary = pyarrow.array(values, pyarrow.large_binary() if name == 'd' else pyarrow.binary()).view(kind)
        column = binary.dictionary_encode() if name == 'e' else binary
        parquet.write_table(pyarrow.table({'text': column}), tmp_path / f'in/{name}.parquet')
    convert(tmp_path / 'out', tmp_path / 'in', 'train', skip_bad_docs=True)
    assert texts(tmp_path / 'out/train') == ['one', 'two'] + ['three', 'vier\u00e9'] * 4
    assert manifest(tmp_path / 'out/train')['bad_documents'] == 3 + 2 * 4 + 1
    out = capsys.readouterr().out
    assert 'a.jsonl, line 3 holds characters that are not Unicode' in out
    assert r"a.jsonl, line 4 has no field 'text'; it has: \ud800" in out
    assert out.count('.parquet, row 2 holds bytes that are not UTF-8 (invalid start byte, byte 0)') == 4
    with pytest.raises(UserError, match='a.jsonl, line 3 holds .*or leave such documents out by --skip_bad_docs'):
        convert(tmp_path / 'out2', tmp_path / 'in', 'train')


def test_nul_bytes_in_text_files_are_bad_documents(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / 'in'
    folder.mkdir()
    for name, data in ('a', b'good'), ('b', b'text' + bytes(99)), ('c', '日本日本\n日本\n'.encode('utf-16-le')):
        (folder / f'{name}.txt').write_bytes(data)
    convert(tmp_path / 'out', folder, 'train', skip_bad_docs=True)
    assert texts(tmp_path / 'out/train') == ['good']
    out = capsys.readouterr().out
    for name in 'bc':
        assert f'{name}.txt, document 1 holds NUL bytes: it is damaged or not UTF-8; download the file again, or' in out


def test_times_of_parquet_are_written_in_utc() -> None:
    for zone in None, timezone.utc, timezone(timedelta(hours=2)):
        time = datetime(2019, 4, 25, 12 + (zone is not None and zone != timezone.utc) * 2, 57, 54, tzinfo=zone)
        assert _as_text(time) == '2019-04-25T12:57:54Z'


def test_text_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / 'in'
    folder.mkdir()
    (folder / 'a.txt').write_bytes(b'\xef\xbb\xbfna\xc3\xafve\r\n\r\n two\x0cwords \n')
    (folder / 'b.TXT.gz').write_bytes(gzip.compress(b'three\n \nfour'))
    (folder / 'c.txt').write_bytes(b' \n\n')
    (folder / 'd.txt').write_bytes(b'good\n\xff\n')
    convert(tmp_path / 'files', folder, 'train', skip_bad_docs=True)
    assert texts(tmp_path / 'files/train') == ['naïve\r\n\r\n two\x0cwords \n', 'three\n \nfour']
    assert 'd.txt, document 1 holds bytes that are not UTF-8' in capsys.readouterr().out
    convert(tmp_path / 'lines', folder, 'train', skip_bad_docs=True, txt_lines=True)
    assert texts(tmp_path / 'lines/train') == ['naïve', ' two\x0cwords ', 'three', 'four', 'good']
    assert 'd.txt, line 2 holds bytes that are not UTF-8' in capsys.readouterr().out
    with pytest.raises(UserError, match="was made with txt_lines None, now True"):
        convert(tmp_path / 'files', folder, 'train', skip_bad_docs=True, txt_lines=True)
    with pytest.raises(UserError, match='--text_column: body: the documents of --source .*in have no fields; leave'):
        convert(tmp_path / 'body', folder, 'train', text_column='body')
    monkeypatch.setattr('src.conversion.documents.MAX_TEXT', 10)
    with pytest.raises(UserError, match='a.txt has more than 10 bytes, and would be one document; add --txt_lines'):
        convert(tmp_path / 'long', folder, 'train')
    write_jsonl(folder / 'e.jsonl', ['x'])
    with pytest.raises(UserError, match='--txt_lines: no .txt file is read from --source .*in; leave it out'):
        convert(tmp_path / 'none', folder, 'train', txt_lines=True)


def test_a_tokenizer_of_little_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_jsonl(tmp_path / 'in/a.jsonl', ['tea tea', 'tea']).parent
    with (folder / 'a.jsonl').open('a') as file:
        file.write('{"text": 1}\n{"text": 2}\n')
    convert(tmp_path / 'out', folder, 'train', train_tokenizer=1000, skip_bad_docs=True)
    out = capsys.readouterr().out
    assert 'note: --train_tokenizer: 1000, but the text yields only 260 tokens' in out
    assert out.count('skipped: ') == 2 and '--train_tokenizer: 2 bad documents were left out' in out
    write_jsonl(folder / 'a.jsonl', ['', ''])
    with pytest.raises(UserError, match='--train_tokenizer: the files hold no text to train it on; check --source'):
        convert(tmp_path / 'empty', folder, 'train', train_tokenizer=1000)
    assert os.listdir(tmp_path / 'empty') == []


def test_a_home_folder_that_the_shell_leaves_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HOME', '/home/me')
    args = convert_c4.parse_args(['--out_root=~/c4', '--source=~/raw', '--tokenizer=~/tok', '--concat_tokens=8'])
    assert (args.out_root, args.source, args.tokenizer) == ('/home/me/c4', '/home/me/raw', '/home/me/tok')


def test_main_takes_a_namespace_of_some_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_jsonl(tmp_path / 'in/a.jsonl', ['one']).parent
    args = argparse.Namespace(out_root=tmp_path / 'out/', splits=['train'], source=folder)
    convert_c4.main(args)
    assert texts(tmp_path / 'out/train') == ['one'] and vars(args).keys() == {'out_root', 'splits', 'source'}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({'out_root': 'x', 'max_doc': '5'}, 'max_doc: no such argument; known are out_root, '),
        ({'out_root': 'x', 'splits': 'val'}, "--splits: 'val' is not a list of one or more of train, val, train_small"),
        ({'out_root': 'x', 'splits': ['test']}, r"--splits: \['test'\] is not a list"),
        ({'out_root': 'x', 'verify': 'x'}, 'give --out_root, or --verify'),
        ({}, 'give --out_root, or --verify')]
    for given, message in wrong:
        with pytest.raises(UserError, match=message):
            convert_c4.main(argparse.Namespace(**given))
    monkeypatch.setattr(sys, 'argv', ['convert_c4.py', '--out_root', 'from-the-command-line'])
    assert convert_c4.parse_args().out_root == 'from-the-command-line'


def test_a_worker_that_is_ended_leaves_no_semaphore() -> None:
    code = ('import multiprocessing, tempfile\n'
            'from src.common.workers import init_conversion_worker\n'
            'if __name__ == "__main__":\n'
            '    arguments = 1, init_conversion_worker, (tempfile.gettempdir(),)\n'
            '    with multiprocessing.get_context("spawn").Pool(*arguments) as pool:\n'
            '        pool.apply(exec, ("import tqdm; list(tqdm.trange(3))",))\n')
    env = {name: value for name, value in os.environ.items() if name != 'TQDM_DISABLE'}
    done = subprocess.run([sys.executable, '-c', code], cwd=REPO, env=env, capture_output=True, text=True, check=True)
    assert '3/3' in done.stderr and 'leaked semaphore' not in done.stderr


def test_packing_does_not_multiply_a_long_document(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tokenizer:
        eos_token_id = 0
        get_vocab = staticmethod(lambda: {'last': 60_000})

    document: Any = np.arange(4_000_001, dtype=np.uint32) % 60_000
    monkeypatch.setattr('src.common.encoding.encode_pieces', lambda *_: iter([[(document, True)]]))
    rows = pack_tokens(iter([{'text': 'long'}]), Tokenizer, 2048, {})
    tracemalloc.start()
    first = next(rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * 2 * len(document)
    assert (np.concatenate([first, *rows])[:len(document)] == document).all()

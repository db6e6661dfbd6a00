"""Each file of a folder is converted once, in its split; files that are not read are listed."""

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
from test_conversion import write_format, write_jsonl
from test_convert_c4 import c4_documents, convert, read_split, write_file

from src.common.errors import UserError
from src.conversion.source_files import SourceFile, _find_split, find_duplicates


def texts(out: Path, *splits: str) -> list[list[object]]:
    return [[row['text'] for row in read_split(out / split)] for split in splits]


def write_named(folder: Path, *names: str) -> Path:
    """Files of one document, which is the name of the file."""
    for name in names:
        write_jsonl(folder / name, [name])
    return folder


def test_the_last_word_of_a_path_says_the_split(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train = ['a-TRAIN.jsonl', 'dev/train.jsonl', 'test/train/b.jsonl']
    val = ['train/val.jsonl', 'training_data/validation.jsonl', 'valid-00001-of-00002.jsonl', 'x/dev/0.json']
    folder = write_named(tmp_path / 'in', *train, *val, 'test.jsonl', 'train/eval-1.jsonl', 'other.jsonl',
                         'training.jsonl', 'valid-00002-of-00002', 'train.jsonl~', 'train/.a.jsonl', '.cache/train.jsonl')
    convert(tmp_path / 'out', folder)
    assert texts(tmp_path / 'out', 'train', 'val') == [train, val]
    out = capsys.readouterr().out
    assert f'train: 3 files in {folder}, {sum(len(json.dumps({"text": name})) + 1 for name in train)} bytes\n' in out
    for line in ('.cache/, train/.a.jsonl: hidden', 'test.jsonl, train/eval-1.jsonl: a test set',
                 'other.jsonl, training.jsonl: the path names no split, and other files are named train',
                 'train.jsonl~, valid-00002-of-00002: the name does not end in .jsonl, .json, .ndjson or .txt, also'):
        assert f'not read: {line}' in out


def test_files_of_no_split_are_train_where_no_file_says_train(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    parts = [f'part-{i}.jsonl' for i in range(7)]
    folder = write_named(tmp_path / 'in', *parts, 'test.jsonl')
    with pytest.raises(UserError, match=rf'holds no files for the split val: .*Move some files to {folder}/validation, or '
                                        r'leave the split out of --splits\nnot read: test.jsonl: a test set'):
        convert(tmp_path / 'out', folder)
    convert(tmp_path / 'out', folder, 'train')
    assert texts(tmp_path / 'out', 'train') == [parts]
    out = capsys.readouterr().out
    assert 'train: no path names train, so all files without a split are train: part-0.jsonl, part-1.jsonl' in out
    assert 'part-4.jsonl and 2 more\n' in out and 'not read: test.jsonl: a test set' in out
    (folder / 'validation').mkdir()
    shutil.move(folder / parts.pop(), folder / 'validation')
    convert(tmp_path / 'out2', folder)
    assert texts(tmp_path / 'out2', 'train', 'val') == [parts, ['part-6.jsonl']]
    shutil.rmtree(folder)
    with pytest.raises(UserError, match='(?s)holds no files for the split train: .*not read: test.jsonl: a test set'):
        convert(tmp_path / 'out3', write_named(folder, 'test.jsonl'), 'train')


@pytest.mark.parametrize('split, names', [
    ('test', ['testset', 'evalsets', 'held_out', 'Held-Out', 'holdout2', 'TestData', 'evals', 'a.testsplit']),
    ('train', ['trainset', 'TrainData', 'train-split']), ('val', ['valset', 'devset', 'validation_data', 'ValidSplit']),
    ('', ['latest', 'contest', 'trainer', 'evaluate', 'trains', 'value', 'device', 'testament', 'upheld_outside'])])
def test_words_of_splits(split: str, names: list[str]) -> None:
    assert {name: _find_split(f'{name}.jsonl') for name in names} == dict.fromkeys(names, split)


def test_a_folder_that_is_named_val(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_named(tmp_path / 'val', 'a.jsonl', 'b.jsonl')
    convert(tmp_path / 'out', folder, 'val')
    assert texts(tmp_path / 'out', 'val') == [['a.jsonl', 'b.jsonl']]
    assert 'val: all files, as no path names a split and the folder is val: a.jsonl, b.jsonl\n' in capsys.readouterr().out
    convert(tmp_path / 'out2', write_named(folder, 'val.jsonl'))
    assert texts(tmp_path / 'out2', 'train', 'val') == [['a.jsonl', 'b.jsonl'], ['val.jsonl']]


def test_files_beside_those_of_c4(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_named(tmp_path / 'in', 'val.jsonl')
    write_file(folder / 'c4-train.00000-of-01024.json.gz', c4_documents('train', 2))
    convert(tmp_path / 'out', folder)
    assert read_split(tmp_path / 'out/train') == [{'text': row['text']} for row in c4_documents('train', 2)]
    assert texts(tmp_path / 'out', 'val') == [['val.jsonl']]
    out = capsys.readouterr().out
    assert 'note: there are other files beside those of C4: val.jsonl; only the text is written.' in out
    assert 'val: 1 files in ' in out and 'files of C4 in' not in out


def test_links_are_followed_and_a_file_is_read_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_named(tmp_path / 'in', 'train/b.jsonl', 'train/c.jsonl')
    write_named(tmp_path, 'above.jsonl', 'elsewhere/far.jsonl', 'elsewhere/deep/far2.jsonl')
    (folder / 'train/a.jsonl').symlink_to('b.jsonl')
    os.link(folder / 'train/c.jsonl', folder / 'train/d.jsonl')
    (folder / 'train/e.jsonl').symlink_to(tmp_path / 'above.jsonl')
    for name, target in {'again': 'train', 'loop': '.', 'up': '..', 'train/linked': '../../elsewhere'}.items():
        (folder / name).symlink_to(target)
    (tmp_path / 'elsewhere/back').symlink_to(folder)
    convert(tmp_path / 'out', folder, 'train')
    found = ['train/b.jsonl', 'train/c.jsonl', 'above.jsonl', 'elsewhere/deep/far2.jsonl', 'elsewhere/far.jsonl']
    assert texts(tmp_path / 'out', 'train') == [found]
    out = capsys.readouterr().out
    assert 'not read: again/, loop/, train/linked/back/, up/: another name of a folder that is read, or a link' in out
    assert 'not read: train/a.jsonl: another name of train/b.jsonl' in out
    assert 'not read: train/d.jsonl: another name of train/c.jsonl' in out


def test_files_of_unclear_splits_are_refused(tmp_path: Path) -> None:
    folder = write_named(tmp_path / 'in', 'a.jsonl')

    def refused(message: str, *names: str) -> None:
        with pytest.raises(UserError, match=message):
            convert(tmp_path / 'out', folder, 'train')
        for name in names:
            (folder / name).unlink()

    (folder / 'val.jsonl').symlink_to('a.jsonl')
    refused(r'in/a.jsonl \(train\) and .*in/val.jsonl \(val\) are one file; delete one', 'val.jsonl')
    os.link(folder / 'a.jsonl', folder / 'test.jsonl')
    refused(r'in/a.jsonl \(train\) and .*in/test.jsonl \(test\) are one file', 'test.jsonl')
    (folder / 'b.jsonl').symlink_to('gone.jsonl')
    refused(r'in/b.jsonl cannot be read \(No such file or directory\); correct .* if it is a link, correct', 'b.jsonl')
    write_named(folder, 'x/train-val.jsonl')
    refused('x/train-val.jsonl: the name train-val.jsonl has words of several splits, train and', 'x/train-val.jsonl')
    with pytest.raises(UserError, match=r'a.jsonl is neither hub .* exists \(it is a file: name its folder\)'):
        convert(tmp_path / 'out', folder / 'a.jsonl', 'train')


def test_what_the_program_wrote_is_no_source(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_named(tmp_path / 'in', 'train/a.jsonl', 'val/a.jsonl')
    write_named(tmp_path / 'own', 'train/part.json', 'train/b.jsonl')
    convert(tmp_path / 'out-own', tmp_path / 'own', 'train')
    assert texts(tmp_path / 'out-own', 'train') == [['train/b.jsonl', 'train/part.json']]
    for _ in range(2):  # the same command goes on
        convert(folder / 'mds', folder, train_tokenizer=300)
        assert texts(folder / 'mds', 'train', 'val') == [['train/a.jsonl'], ['val/a.jsonl']]
    assert 'not read: mds/: it is the folder of --out_root' in capsys.readouterr().out
    (folder / 'mds/train/manifest.json').unlink()
    (folder / 'mds/train/index.json').unlink()  # as of a run that was stopped
    convert(tmp_path / 'out', folder)
    assert texts(tmp_path / 'out', 'train', 'val') == [['train/a.jsonl'], ['val/a.jsonl']]
    out = capsys.readouterr().out
    assert 'not read: mds/tokenizer/: it holds a tokenizer that a conversion wrote' in out
    assert 'not read: mds/train/00000/, mds/val/: it holds shards that a conversion wrote' in out
    for same in folder, folder / 'train/..':
        with pytest.raises(UserError, match='--out_root: .* is also the folder of --source'):
            convert(same, folder)
    convert(tmp_path, folder, 'val')  # the other way round
    assert texts(tmp_path, 'val') == [['val/a.jsonl']]


def test_endings(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / 'in'
    folder.mkdir()
    names = ['a.json', 'b.jsonl', 'c.ndjson', 'd.NDJSON.GZ', 'e.JSON.Zst', 'f.Parquet', 'g.jsonl.gz']
    for name in names:
        write_format(folder / name.lower(), [name])
        (folder / name.lower()).rename(folder / name)
    others = ['h.csv', 'i.jsonl.bz2', 'j.jsonl.xz', 'k.tsv', 'l.zip']
    for name in [*others, 'm.txt', 'n.txt.gz']:
        (folder / name).write_text('?')
    os.mkfifo(folder / 'o.jsonl')
    convert(tmp_path / 'out', folder, 'train', text_column='body')
    assert texts(tmp_path / 'out', 'train') == [names]
    out = capsys.readouterr().out
    assert f'not read: {", ".join(others)}: the name does not end in' in out
    assert 'not read: o.jsonl: not a regular file' in out
    assert 'not read: m.txt, n.txt.gz: text files are read only if the folder has no JSON or Parquet files' in out


def test_files_that_seem_the_same_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_jsonl(tmp_path / 'in/train.jsonl', ['one']).parent
    (folder / 'train.jsonl.gz').write_bytes(gzip.compress((folder / 'train.jsonl').read_bytes()))
    write_jsonl(folder / 'val.jsonl', ['one'])
    convert(tmp_path / 'out', folder)
    out = capsys.readouterr().out
    for other in 'train.jsonl.gz', 'val.jsonl':
        assert f'note: these files seem to hold the same documents, and all of them are read: {folder}/train.jsonl, ' \
               f'{folder}/{other}\n' in out
    convert(tmp_path / 'out2', write_named(tmp_path / 'one', 'a.jsonl'), 'train', 'train_small')
    assert 'note: these files' not in capsys.readouterr().out
    notes = find_duplicates(SourceFile(f'{i % 9}/{i}.txt', 3, f'{i % 9}') for i in range(18))
    assert len(notes) == 5
    (tmp_path / 'small').mkdir()
    paths = [str(tmp_path / f'small/{name}.txt') for name in ('train', 'train2', 'val')]
    for path in paths:
        Path(path).write_text('one')
    convert(tmp_path / 'out3', tmp_path / 'small')
    assert f'and all of them are read: {", ".join(paths)}\n' in capsys.readouterr().out


def test_small_text_files_are_converted_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / 'in'
    folder.mkdir()
    for i in range(5):
        (folder / f'{i}.txt').write_text(f'document {i}')
    monkeypatch.setattr('src.conversion.source_files.MAX_GROUP_BYTES', 25)
    convert(tmp_path / 'out', folder, 'train')
    parts = [json.loads((tmp_path / f'out/train/0000{i}/part.json').read_text()) for i in range(3)]
    assert [part['documents'] for part in parts] == [2, 2, 1]
    assert '0.txt and 1 more (20 bytes ' in parts[0]['made_from']['file']
    assert texts(tmp_path / 'out', 'train') == [[f'document {i}' for i in range(5)]]
    (folder / '1.txt').write_text('document x')
    with pytest.raises(UserError, match='train/00000 was made with file .0.txt and 1 more'):
        convert(tmp_path / 'out', folder, 'train')

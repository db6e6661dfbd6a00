"""Work grows no faster than the number of files, parts, shards and checkpoints. The tests count looks, and time nothing.

`python tests/growth.py` measures the seconds.
"""

import argparse
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from src.checkpoints.manifest import Manifest, RunInfo
from src.checkpoints.start import FRESH, find_start
from src.checkpoints.writer import CheckpointWriter
from src.common.storage import LocalFolder
from src.common.workers import map_in_threads
from src.conversion import manifest, source_files
from src.loader import shared_memory

FEW, MANY = 40, 400  # ten times: what grows with the square of the number grows a hundred times


class Name(str):
    """A name that counts how often any name is hashed or compared."""

    looks = 0

    def __hash__(self) -> int:
        Name.looks += 1
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        Name.looks += 1
        return super().__eq__(other)


class Counted(list):
    """A list that counts how many of its elements are read one after another."""

    looks = 0

    def __iter__(self) -> Any:
        Counted.looks += len(self)
        return super().__iter__()


def growth(count: Callable[[int], int]) -> float:
    return count(MANY) / count(FEW)


def test_files_of_a_source_are_looked_at_a_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text file beside each JSON file, which has a second name."""
    def looks(n: int) -> int:
        folder = tmp_path / f'{n}'
        folder.mkdir()
        names = []
        for i in range(n):
            (folder / f'{i}.jsonl').write_text('{"text": "a"}')
            (folder / f'{i}.txt').touch()
            os.link(folder / f'{i}.jsonl', folder / f'{i}-link.jsonl')
            names += [Name(f'{i}.jsonl'), Name(f'{i}-link.jsonl'), Name(f'{i}.txt')]
        monkeypatch.setattr(source_files, '_list_files', lambda *_: (names, {}))
        Name.looks = 0
        source = source_files.FolderSource(str(folder), str(tmp_path / 'out'))
        assert len(source.paths['train']) == n and len(source.unread) == 2 * n
        return Name.looks

    assert growth(looks) < 20  # sorting takes n log n comparisons


def test_small_text_files_are_joined_once(monkeypatch: pytest.MonkeyPatch) -> None:
    original = source_files.SourceFile
    files = [original(f'{i}.txt', 2, 'x') for i in range(MANY)]
    joined = []

    def record(*fields: Any) -> source_files.SourceFile:
        joined.append(original(*fields))
        return joined[-1]

    monkeypatch.setattr(source_files, 'SourceFile', record)
    [group] = source_files._group_text_files(files)
    assert (group.size, group.paths) == (2 * MANY, tuple(f'{i}.txt' for i in range(MANY)))
    assert sum(len(file.paths) for file in joined) == MANY


def test_parts_of_a_split_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def looks(n: int) -> int:
        for i in range(n):
            (tmp_path / f'{n}' / f'{i:05}').mkdir(parents=True)
        Counted.looks = 0
        manifest.check_no_foreign_files(str(tmp_path / f'{n}'), n)
        return Counted.looks

    names_of_parts = manifest._part_names
    monkeypatch.setattr(manifest, '_part_names', lambda names: Counted(names_of_parts(names)))
    assert growth(looks) == MANY / FEW


def test_a_start_reads_the_newest_manifest_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for batch in range(1, MANY + 1):
        (tmp_path / f'ep0-ba{batch}-rank0.pt').write_text('weights')
        saved = Manifest(f'ep0-ba{batch}', False, 0, batch, batch, batch, 1, {f'ep0-ba{batch}-rank0.pt': 7})
        (tmp_path / f'ep0-ba{batch}.json').write_text(json.dumps(asdict(saved)))
    reads = []
    read = LocalFolder.read_bytes
    monkeypatch.setattr(LocalFolder, 'read_bytes', lambda self, name: reads.append(name) or read(self, name))
    start = find_start(str(tmp_path), 'run', True, None, False)
    assert start.manifest and start.manifest.batch == MANY
    writer = CheckpointWriter(str(tmp_path), '1ba', -1, FRESH, RunInfo({}, '', '', {}))
    state: Any = argparse.Namespace(run_name='run', timestamp=argparse.Namespace(batch=MANY))
    writer.init(state, state)
    writer.check(state)
    assert reads == [f'ep0-ba{MANY}.json']


def test_stale_lock_files_need_one_look_at_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, locks = tmp_path / 'shm', tmp_path / 'tmp'
    blocks.mkdir()
    locks.mkdir()
    for i in range(FEW):
        (locks / f'{i:06}_barrier_filelock').touch()
    (blocks / '000007_something_of_another_user').touch()
    monkeypatch.setattr(shared_memory, 'BLOCKS', blocks)
    monkeypatch.setattr(shared_memory, 'gettempdir', lambda: str(locks))
    looked_at = []
    for function in ('scandir', 'listdir'):
        original = getattr(os, function)
        monkeypatch.setattr(os, function, lambda path, original=original: looked_at.append(path) or original(path))
    removed = shared_memory.remove_stale()
    assert sorted(removed) == [f'{i:06}_barrier_filelock' for i in range(FEW) if i != 7]
    assert len([path for path in looked_at if Path(path) == blocks]) == 2


def test_threads_take_shares_of_the_items(monkeypatch: pytest.MonkeyPatch) -> None:
    submitted = []
    submit = ThreadPoolExecutor.submit
    monkeypatch.setattr(ThreadPoolExecutor, 'submit', lambda self, *args: submitted.append(args) or submit(self, *args))
    assert map_in_threads(str, range(MANY), 16) == [str(i) for i in range(MANY)]
    assert len(submitted) == 16
    assert map_in_threads(str, [7], 16) == ['7'] and map_in_threads(str, [], 16) == []
    with pytest.raises(ZeroDivisionError):
        map_in_threads(lambda i: 1 / i, [2, 1, 0])


def test_threads_raise_the_error_of_the_first_item() -> None:
    second_has_failed = threading.Event()

    def fail(i: int) -> None:
        if i == 0:
            assert second_has_failed.wait(10)
        if i == 1:
            second_has_failed.set()
        raise ValueError(i)

    with pytest.raises(ValueError, match='^0$'):
        map_in_threads(fail, range(MANY), 2)

"""The files of a folder: which of them hold the documents of which split, and which are not read, and why."""

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Optional

from src.common.errors import UserError
from src.config.data_places import is_url

C4_COLUMNS = ('text', 'timestamp', 'url')
PACKED = ('', '.gz', '.zst')
TXT = tuple(f'.txt{packed}' for packed in PACKED)
FORMATS = (*(f'.{kind}{packed}' for packed in PACKED for kind in ('jsonl', 'json', 'ndjson')), '.parquet', *TXT)
SPLIT_WORDS = {
    'train': ('train',), 'val': ('validation', 'valid', 'val', 'dev'),
    'test': ('tests?', 'testing', 'evals?', 'evaluation', 'h[eo]ld[-_ ]?out'),  # never read
}  # fmt: skip
IN_PATH = {split: re.compile(rf'(?<![a-z])({"|".join(words)})((set|split)s?|data)?(?![a-z])', re.IGNORECASE)
           for split, words in SPLIT_WORDS.items()}
SAMPLED = 1 << 16  # bytes at both ends of a file that tell it from another
GROUPED = 1 << 26  # bytes of small text files that are converted together
SHOWN = 5  # names in a list
READABLE = '.jsonl, .json, .ndjson or .txt, also with .gz or .zst, or in .parquet'


class SourceFile(NamedTuple):
    """A file of documents: the unit of work of a conversion."""
    path: str  # on this disk, or `hf://datasets/REPOSITORY@REVISION/PATH`
    size: int  # in bytes, of all its paths
    digest: str = ''  # a hash of the ends of the file, where no revision names its content
    more: tuple[str, ...] = ()  # further paths: small text files are converted together

    @property
    def paths(self) -> tuple[str, ...]:
        return self.path, *self.more

    @property
    def identity(self) -> str:
        """What a file of the same content keeps where it is moved to another folder."""
        name = self.path if is_url(self.path) else Path(self.path).name
        name += f' and {len(self.more)} more' if self.more else ''
        return f'{name} ({self.size} bytes{self.digest and " "}{self.digest})'


class FolderSource:
    """Files below a folder: C4's own, such as `c4-train.00000-of-01024.json.gz`, or others, by the name of their split.

    Links to folders are followed. What lies in `out_root`, where the shards will lie, is not read. Raises UserError
    where there is no such folder, or the splits of its files are not clear.

    Attributes:
        paths: Of the files, relative to `folder`, by split.
        unread: The files and folders that are not read, relative to `folder`: path → reason.
    """

    revision = None

    def __init__(self, folder: str, out_root: str) -> None:
        if not Path(folder).is_dir():
            is_file = ' (it is a file: name its folder)' if Path(folder).exists() else ''
            raise UserError(f'--source: {folder} is neither hub nor sample nor a FOLDER that exists{is_file}; a FOLDER '
                            f"holds files of documents: C4's own, or others that end in {READABLE}")
        out = None if is_url(out_root) else Path(out_root).resolve()
        self.folder, self.name = Path(folder), folder
        self.read: dict[str, SourceFile] = {}  # those of the splits that were asked for, each alone, by path
        if out == self.folder.resolve():
            raise UserError(f'--out_root: {out_root} is the folder of --source too, so that the shards would lie among '
                            'the documents; name another folder, which may lie below --source')
        with _readable():
            paths, self.unread = _list_files(self.folder, out)
            self.paths = self._assign(paths)
        found = [path for of_split in self.paths.values() for path in of_split]
        others = [path for path in found if not re.match(r'c4-(train|validation)\.', Path(path).name)]
        self.is_c4 = bool(found) and not others
        if 0 < len(others) < len(found):
            print(f'note: beside the files of C4 there are others: {list_some(others)}; so the text alone is written. '
                  'To keep timestamp and url, move the others to a folder of their own')
        self.columns = C4_COLUMNS if self.is_c4 else C4_COLUMNS[:1]

    def _assign(self, paths: list[str]) -> dict[str, list[str]]:
        """Gives each file to a split, once."""
        texts = [path for path in paths if path.lower().endswith(TXT)]
        if len(texts) < len(paths):
            paths = [path for path in paths if path not in {*texts}]
            self.unread |= dict.fromkeys(texts, 'text files are read from a folder that has no JSON or parquet files')
        splits: dict[str, list[str]] = {'train': [], 'val': [], 'test': [], '': []}
        for path in paths:
            splits[_split_of(path)].append(path)
        unnamed = splits.pop('')
        if unnamed and not any(splits.values()) and IN_PATH['val'].fullmatch(Path(os.path.abspath(self.folder)).name):
            print(f'val: no file says a split, and the name of the folder is a word of val: {list_some(unnamed)}')
            splits['val'] = unnamed
        elif splits['train']:
            self.unread |= dict.fromkeys(unnamed, 'no word of the path says a split, and other files say train')
        elif unnamed:
            print(f'train: no file says train, so it is all files that say no split: {list_some(unnamed)}')
            splits['train'] = unnamed
        self._drop_second_names(splits)
        self.unread |= dict.fromkeys(splits.pop('test'), 'a test set')
        return splits

    def _drop_second_names(self, splits: dict[str, list[str]]) -> None:
        """Keeps one name of a file that has several, by symbolic or hard links."""
        first: dict[object, tuple[str, str]] = {}
        inside = self.folder.resolve()
        names = [(path, split) for split, of_split in splits.items() for path in of_split]
        # links last
        for path, split in sorted(names, key=lambda name: ((inside / name[0]).resolve() != inside / name[0], name)):
            info = os.stat(self.folder / path)
            # On some network file systems the number of an inode is not its own
            file = (info.st_dev, info.st_ino) if info.st_nlink > 1 else (inside / path).resolve()
            known_split, known = first.setdefault(file, (split, path))
            if known_split != split:
                raise UserError(f'--source: {self.folder / known} ({known_split}) and {self.folder / path} ({split}) '
                                'are one file; delete one of the names, or copy the file if both splits are to have it')
            if known != path:
                splits[split].remove(path)
                self.unread[path] = f'another name of {known}'

    def files(self, split: str) -> list[SourceFile]:
        """The files of `train` or `val`, sorted. Raises UserError where there are none."""
        found, words = self.paths[split], SPLIT_WORDS[split]
        if not found:
            raise UserError('\n'.join([
                f'--source: {self.folder} holds no files for the split {split}: expected c4-{words[0]}.*.json.gz, or '
                f'the word {" or ".join(words)} in the path of a file that ends in {READABLE}. Move some files to '
                f'{self.folder / words[0]}, or leave the split out of --splits', *self.unread_lines()]))
        by_name: dict[str, str] = {}
        for path in map(Path, found):
            other = by_name.setdefault(path.name, str(self.folder / path.parent))
            if self.is_c4 and other != str(self.folder / path.parent):
                raise UserError(f'--source: {path.name} lies in {other} and {self.folder / path.parent}; name the '
                                'folder of one of them')
        with _readable():
            files = [_local_file(str(self.folder / p)) for p in found]
        self.read |= {file.path: file for file in files}
        return _grouped(files)

    def unread_lines(self) -> list[str]:
        """What is not read, a line for each reason."""
        by_reason: dict[str, list[str]] = {}
        for path, reason in sorted(self.unread.items()):
            by_reason.setdefault(reason, []).append(path)
        return [f'not read: {list_some(paths)}: {reason}' for reason, paths in by_reason.items()]


def list_some(names: list[str]) -> str:
    """A few names, and how many there are more."""
    return ', '.join(names[:SHOWN]) + (f' and {len(names) - SHOWN} more' if len(names) > SHOWN else '')


def find_duplicates(files: Iterable[SourceFile]) -> list[str]:
    """A note for files that seem to hold the same documents: by content, or by names such as a.jsonl and a.jsonl.gz."""
    alike: dict[object, list[str]] = {}
    for file in files:
        if file.size:
            stem = re.sub(r'\.(jsonl|json|ndjson|parquet|txt)(\.gz|\.zst)?$', '', file.path, flags=re.IGNORECASE)
            for key in (file.size, file.digest), stem:
                alike.setdefault(key, []).append(file.path)
    same = dict.fromkeys(tuple(paths) for paths in alike.values() if len(paths) > 1)
    return [f'note: these files seem to hold the same documents, and all of them are read: {list_some(list(paths))}'
            for paths in same][:SHOWN]


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f'--source: {error.filename} cannot be read ({error.strerror}); mend its permissions or the '
                        'disk; of a link, the file that it leads to, or delete it') from error


def _raise(error: OSError) -> None:
    raise error


def _list_files(folder: Path, out_root: Optional[Path]) -> tuple[list[str], dict[str, str]]:
    """Relative paths of the files that can hold documents, sorted; and reasons of all others."""
    paths, unread, waiting = [], {}, [str(folder)]
    visited = {str(parent) for parent in folder.resolve().parents}  # a link to one of them is a loop
    if out_root and folder.resolve().is_relative_to(out_root):
        out_root = None  # the documents lie below it
    for top in waiting:  # grows by links to folders, so that a folder is read by its own name first
        for root, folders, names in os.walk(top, onerror=_raise):
            here, real = Path(root).relative_to(folder), Path(root).resolve()
            if reason := _why_skip_folder(here.name, real, names, visited, out_root):
                unread[f'{here.as_posix()}/'] = reason
                folders.clear()
                continue
            visited.add(str(real))
            waiting += sorted(path for name in folders if os.path.islink(path := os.path.join(root, name)))
            for name in names:
                path = (here / name).as_posix()
                if reason := _why_skip_file(name, folder / path):
                    unread[path] = reason
                else:
                    paths.append(path)
    return sorted(paths), unread


def _why_skip_folder(name: str, real: Path, names: Iterable[str], visited: set[str], out_root: Optional[Path]) -> str:
    names = set(names)
    if name.startswith('.'):
        return 'hidden'
    if out_root and real.is_relative_to(out_root):
        return 'it is the folder of --out_root'
    if str(real) in visited:
        return 'another name of a folder that is read, or a link to a folder above'
    shards = 'manifest.json' in names or any('.mds' in name for name in names)
    if 'index.json' in names and ('part.json' in names or shards):
        return 'it holds shards, which a conversion has made'
    return 'it holds a tokenizer, which a conversion has made' if {'trained.json', 'tokenizer.json'} <= names else ''


def _why_skip_file(name: str, path: Path) -> str:
    if name.startswith('.'):
        return 'hidden'
    if not name.lower().endswith(FORMATS):
        return f'the name does not end in {READABLE}'
    return '' if stat.S_ISREG(path.stat().st_mode) else 'no regular file'  # which raises at a link to nowhere


def _split_of(path: str) -> str:
    """The split that a path says, by the last of its parts that says one: `dev/train.jsonl` is of train. Or ''."""
    for part in reversed(path.split('/')):
        found = [split for split, word in IN_PATH.items() if word.search(part)]
        if len(found) > 1:
            raise UserError(f'--source: {path}: the name {part} has words of several splits, {" and ".join(found)}; '
                            'rename it, so that it says one of them')
        if found:
            return found[0]
    return ''


def _local_file(path: str) -> SourceFile:
    with open(path, 'rb') as file:
        ends = hashlib.blake2b(file.read(SAMPLED), digest_size=8)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - SAMPLED, 0))
        ends.update(file.read(SAMPLED))
    return SourceFile(path, size, ends.hexdigest())


def _grouped(files: list[SourceFile]) -> list[SourceFile]:
    """Joins text files that follow one another, up to GROUPED bytes: a shard for each document would be too small."""
    out: list[SourceFile] = []
    for file in files:
        last = out[-1] if out else None
        if last is None or not file.path.lower().endswith(TXT) or last.size + file.size > GROUPED:
            out.append(file)
        else:
            digest = hashlib.blake2b(f'{last.digest} {file.digest}'.encode(), digest_size=8).hexdigest()
            out[-1] = SourceFile(last.path, last.size + file.size, digest, (*last.more, file.path))
    return out

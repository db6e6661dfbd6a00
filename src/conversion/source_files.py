"""Finds the files of documents in a folder, assigns each to a split, and tells why others are not read."""

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
COMPRESSION_ENDINGS = ('', '.gz', '.zst')
TXT_ENDINGS = tuple(f'.txt{ending}' for ending in COMPRESSION_ENDINGS)
JSON_ENDINGS = tuple(f'.{kind}{ending}' for ending in COMPRESSION_ENDINGS for kind in ('jsonl', 'json', 'ndjson'))
ENDINGS = (*JSON_ENDINGS, '.parquet', *TXT_ENDINGS)
SPLIT_WORDS = {
    'train': ('train',), 'val': ('validation', 'valid', 'val', 'dev'),
    'test': ('tests?', 'testing', 'evals?', 'evaluation', 'h[eo]ld[-_ ]?out'),  # never read
}  # fmt: skip
SPLIT_PATTERNS = {split: re.compile(rf'(?<![a-z])({"|".join(words)})((set|split)s?|data)?(?![a-z])', re.IGNORECASE)
                  for split, words in SPLIT_WORDS.items()}
HASHED_BYTES = 1 << 16  # bytes at each end of a file that are hashed, to tell files apart
MAX_GROUP_BYTES = 1 << 26  # bytes of small text files that become one part
MAX_SHOWN = 5  # names in a message
READABLE_ENDINGS = '.jsonl, .json, .ndjson or .txt, also with .gz or .zst, or in .parquet'


class SourceFile(NamedTuple):
    """A file of documents, or a group of small text files, that one process converts into one part."""
    path: str  # on this disk, or `hf://datasets/REPOSITORY@REVISION/PATH`
    size: int  # in bytes, of all paths
    digest: str = ''  # a hash of both ends of a local file; a file on the hub has a revision instead
    more_paths: tuple[str, ...] = ()  # the other files of a group

    @property
    def paths(self) -> tuple[str, ...]:
        return self.path, *self.more_paths

    @property
    def identity(self) -> str:
        """A text that differs for files of different content, and stays the same if a file moves to another folder."""
        name = self.path if is_url(self.path) else Path(self.path).name
        name += f' and {len(self.more_paths)} more' if self.more_paths else ''
        return f'{name} ({self.size} bytes{self.digest and " "}{self.digest})'


class FolderSource:
    """The files in a folder and its subfolders: C4's own, such as `c4-train.00000-of-01024.json.gz`, or others.

    A word in its path assigns a file to a split. Links to folders are followed. `out_root`, where the shards go, is not
    read. Raises UserError if there is no such folder, or a file could belong to two splits.

    Attributes:
        paths: split → the paths of its files, relative to `folder`.
        unread: path of a file or folder that is not read, relative to `folder` → reason.
        read_files: path → file, of the splits that were asked for. Here text files are not grouped.
    """

    revision = None

    def __init__(self, folder: str, out_root: str) -> None:
        if not Path(folder).is_dir():
            is_file = ' (it is a file: name its folder)' if Path(folder).exists() else ''
            raise UserError(f'--source: {folder} is neither hub nor sample nor a FOLDER that exists{is_file}; a FOLDER '
                            f"holds files of documents: C4's own, or others that end in {READABLE_ENDINGS}")
        out = None if is_url(out_root) else Path(out_root).resolve()
        self.folder, self.name = Path(folder), folder
        self.read_files: dict[str, SourceFile] = {}
        if out == self.folder.resolve():
            raise UserError(f'--out_root: {out_root} is also the folder of --source, and shards would lie among the '
                            'documents; name another folder; it may lie inside that of --source')
        with _explain_read_errors():
            paths, self.unread = _list_files(self.folder, out)
            self.paths = self._assign_splits(paths)
        read = [path for split_paths in self.paths.values() for path in split_paths]
        others = [path for path in read if not re.match(r'c4-(train|validation)\.', Path(path).name)]
        self.is_c4 = bool(read) and not others
        if 0 < len(others) < len(read):
            print(f'note: there are other files beside those of C4: {list_some(others)}; only the text is written. '
                  'To keep timestamp and url too, move the other files to another folder')
        self.columns = C4_COLUMNS if self.is_c4 else C4_COLUMNS[:1]

    def _assign_splits(self, paths: list[str]) -> dict[str, list[str]]:
        """Assigns each file to one split."""
        texts = [path for path in paths if path.lower().endswith(TXT_ENDINGS)]
        if len(texts) < len(paths):
            paths = [path for path in paths if not path.lower().endswith(TXT_ENDINGS)]
            self.unread |= dict.fromkeys(texts, 'text files are read only if the folder has no JSON or Parquet files')
        splits: dict[str, list[str]] = {'train': [], 'val': [], 'test': [], '': []}
        for path in paths:
            splits[_find_split(path)].append(path)
        unnamed = splits.pop('')
        folder_name = Path(os.path.abspath(self.folder)).name
        if unnamed and not any(splits.values()) and SPLIT_PATTERNS['val'].fullmatch(folder_name):
            print(f'val: all files, as no path names a split and the folder is {folder_name}: {list_some(unnamed)}')
            splits['val'] = unnamed
        elif splits['train']:
            self.unread |= dict.fromkeys(unnamed, 'the path names no split, and other files are named train')
        elif unnamed:
            print(f'train: no path names train, so all files without a split are train: {list_some(unnamed)}')
            splits['train'] = unnamed
        self._drop_duplicate_names(splits)
        self.unread |= dict.fromkeys(splits.pop('test'), 'a test set')
        return splits

    def _drop_duplicate_names(self, splits: dict[str, list[str]]) -> None:
        """Keeps one name of each file that has several, through symbolic or hard links."""
        first: dict[object, tuple[str, str]] = {}
        dropped: dict[str, str] = {}
        inside = self.folder.resolve()
        names = [(path, split) for split, split_paths in splits.items() for path in split_paths]
        # Sort links last, so that the file's own name is kept
        for path, split in sorted(names, key=lambda name: ((inside / name[0]).resolve() != inside / name[0], name)):
            info = os.stat(self.folder / path)
            # On some network file systems, files share the number of an inode
            file = (info.st_dev, info.st_ino) if info.st_nlink > 1 else (inside / path).resolve()
            known_split, known = first.setdefault(file, (split, path))
            if known_split != split:
                raise UserError(f'--source: {self.folder / known} ({known_split}) and {self.folder / path} ({split}) '
                                'are one file; delete one of the names, or copy the file to use it in both splits')
            if known != path:
                dropped[path] = f'another name of {known}'
        for split, split_paths in splits.items():
            splits[split] = [path for path in split_paths if path not in dropped]
        self.unread |= dropped

    def files(self, split: str) -> list[SourceFile]:
        """Returns the files of `train` or `val`, sorted. Raises UserError if there are none."""
        paths, words = self.paths[split], SPLIT_WORDS[split]
        if not paths:
            raise UserError('\n'.join([
                f'--source: {self.folder} holds no files for the split {split}: expected c4-{words[0]}.*.json.gz, or '
                f'the word {" or ".join(words)} in the path of a file that ends in {READABLE_ENDINGS}. Move some files '
                f'to {self.folder / words[0]}, or leave the split out of --splits', *self.unread_lines()]))
        by_name: dict[str, str] = {}
        for path in map(Path, paths):
            other = by_name.setdefault(path.name, str(self.folder / path.parent))
            if self.is_c4 and other != str(self.folder / path.parent):
                raise UserError(f'--source: {path.name} lies in {other} and {self.folder / path.parent}; name the '
                                'folder of one of them')
        with _explain_read_errors():
            files = [_describe_file(str(self.folder / p)) for p in paths]
        self.read_files |= {file.path: file for file in files}
        return _group_text_files(files)

    def unread_lines(self) -> list[str]:
        """Returns a line for each reason, with the files that are not read."""
        by_reason: dict[str, list[str]] = {}
        for path, reason in sorted(self.unread.items()):
            by_reason.setdefault(reason, []).append(path)
        return [f'not read: {list_some(paths)}: {reason}' for reason, paths in by_reason.items()]


def list_some(names: list[str]) -> str:
    """Joins the first names, and says how many more there are."""
    return ', '.join(names[:MAX_SHOWN]) + (f' and {len(names) - MAX_SHOWN} more' if len(names) > MAX_SHOWN else '')


def find_duplicates(files: Iterable[SourceFile]) -> list[str]:
    """Returns a note for files of the same content, or of names such as a.jsonl and a.jsonl.gz."""
    alike: dict[object, list[str]] = {}
    for file in files:
        if file.size:
            stem = re.sub(r'\.(jsonl|json|ndjson|parquet|txt)(\.gz|\.zst)?$', '', file.path, flags=re.IGNORECASE)
            for key in (file.size, file.digest), stem:
                alike.setdefault(key, []).append(file.path)
    same = dict.fromkeys(tuple(paths) for paths in alike.values() if len(paths) > 1)
    return [f'note: these files seem to hold the same documents, and all of them are read: {list_some(list(paths))}'
            for paths in same][:MAX_SHOWN]


@contextmanager
def _explain_read_errors() -> Iterator[None]:
    """Turns an OSError into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f'--source: {error.filename} cannot be read ({error.strerror}); correct its permissions or '
                        'the disk; if it is a link, correct its target or delete the link') from error


def _raise_error(error: OSError) -> None:
    raise error


def _list_files(folder: Path, out_root: Optional[Path]) -> tuple[list[str], dict[str, str]]:
    """Returns the relative paths of files that can hold documents, sorted; and others with the reason."""
    paths, unread, queue = [], {}, [str(folder)]
    visited = {str(parent) for parent in folder.resolve().parents}  # a link to one of them is a loop
    if out_root and folder.resolve().is_relative_to(out_root):
        out_root = None  # the documents lie in it: do not skip it
    for top in queue:  # links to folders are added at the end, so that a folder is read by its own name first
        for root, folders, names in os.walk(top, onerror=_raise_error):
            relative, resolved = Path(root).relative_to(folder), Path(root).resolve()
            if reason := _why_skip_folder(relative.name, resolved, names, visited, out_root):
                unread[f'{relative.as_posix()}/'] = reason
                folders.clear()
                continue
            visited.add(str(resolved))
            queue += sorted(path for name in folders if os.path.islink(path := os.path.join(root, name)))
            for name in names:
                path = (relative / name).as_posix()
                if reason := _why_skip_file(name, folder / path):
                    unread[path] = reason
                else:
                    paths.append(path)
    return sorted(paths), unread


def _why_skip_folder(name: str, resolved: Path, names: Iterable[str], visited: set[str], out_root: Optional[Path],
                     ) -> str:
    """Returns why a folder is not read; an empty text if it is read."""
    names = set(names)
    if name.startswith('.'):
        return 'hidden'
    if out_root and resolved.is_relative_to(out_root):
        return 'it is the folder of --out_root'
    if str(resolved) in visited:
        return 'another name of a folder that is read, or a link to a folder above'
    has_shards = 'manifest.json' in names or any('.mds' in name for name in names)
    if 'index.json' in names and ('part.json' in names or has_shards):
        return 'it holds shards that a conversion wrote'
    return 'it holds a tokenizer that a conversion wrote' if {'trained.json', 'tokenizer.json'} <= names else ''


def _why_skip_file(name: str, path: Path) -> str:
    if name.startswith('.'):
        return 'hidden'
    if not name.lower().endswith(ENDINGS):
        return f'the name does not end in {READABLE_ENDINGS}'
    return '' if stat.S_ISREG(path.stat().st_mode) else 'not a regular file'  # `stat` raises at a broken link


def _find_split(path: str) -> str:
    """Returns the split that a path names, by its last part that names one (`dev/train.jsonl`: train); '' for none."""
    for part in reversed(path.split('/')):
        found = [split for split, word in SPLIT_PATTERNS.items() if word.search(part)]
        if len(found) > 1:
            raise UserError(f'--source: {path}: the name {part} has words of several splits, {" and ".join(found)}; '
                            'rename it, so that it names only one')
        if found:
            return found[0]
    return ''


def _describe_file(path: str) -> SourceFile:
    with open(path, 'rb') as file:
        ends = hashlib.blake2b(file.read(HASHED_BYTES), digest_size=8)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - HASHED_BYTES, 0))
        ends.update(file.read(HASHED_BYTES))
    return SourceFile(path, size, ends.hexdigest())


def _group_text_files(files: list[SourceFile]) -> list[SourceFile]:
    """Joins neighbouring text files up to MAX_GROUP_BYTES: a part for each document would be too small."""
    groups: list[list[SourceFile]] = []
    size = 0
    for file in files:
        if not groups or not file.path.lower().endswith(TXT_ENDINGS) or size + file.size > MAX_GROUP_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += file.size
    return [_join(group) for group in groups]


def _join(group: list[SourceFile]) -> SourceFile:
    digest = group[0].digest
    for file in group[1:]:
        digest = hashlib.blake2b(f'{digest} {file.digest}'.encode(), digest_size=8).hexdigest()
    paths = [file.path for file in group]
    return SourceFile(paths[0], sum(file.size for file in group), digest, tuple(paths[1:]))

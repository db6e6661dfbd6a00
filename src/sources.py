"""Where documents come from: C4 or another data set on the Hugging Face hub, a folder of files, the embedded sample.

A split is a list of files. A file is the unit of work of a conversion: one process reads it, from its beginning to its end.
"""

import errno
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Optional, Protocol

import orjson
from isal import igzip, igzip_lib

from src.data_places import is_url
from src.errors import DISK_FULL, UserError, first_line

C4 = 'allenai/c4'
C4_COLUMNS = ('text', 'timestamp', 'url')
C4_COUNTS = {'train': (1024, 364_868_892), 'val': (8, 364_608)}  # files, documents of its config `en`
HUB_NAMES = {'train': ('train',), 'val': ('validation', 'valid', 'val', 'dev')}  # what others call the splits
FORMATS = ('.jsonl', '.json', '.jsonl.gz', '.json.gz', '.jsonl.zst', '.json.zst', '.parquet')
ATTEMPTS = 10  # to fetch a file; the waits between them, 1 s to 1 min, sum to about 4 minutes
DISK = (*DISK_FULL, errno.EROFS)  # of an OSError: this machine's fault, not the network's
SAMPLED = 1 << 16  # bytes at both ends of a file that tell it from another

Document = dict[str, str]


class SourceFile(NamedTuple):
    """A path, or `hf://datasets/REPOSITORY@REVISION/PATH`; its bytes; a hash of its ends where no revision names it."""
    path: str
    size: int
    digest: str = ''

    @property
    def identity(self) -> str:
        """What a file of the same content keeps where it is moved to another folder."""
        name = self.path if is_url(self.path) else Path(self.path).name
        return f'{name} ({self.size} bytes{self.digest and " "}{self.digest})'


class Source(Protocol):
    """What `convert_c4.py --source` names.

    Attributes:
        name: For the manifest.
        revision: The commit of the hub's repository; None for files.
        columns: What each document is stored with; the first holds the text.
        is_c4: Whether it is C4's config `en`, whose files and documents are counted.
    """
    name: str
    revision: Optional[str]
    columns: tuple[str, ...]
    is_c4: bool

    def files(self, split: str) -> list[SourceFile]:
        """The files of `train` or `val`, sorted. Raises UserError where there are none."""
        ...


# ---------------------------------------------------------------- folders


class FolderSource:
    """Files below a folder: C4's own, such as `c4-train.00000-of-01024.json.gz`, or others, by the name of their split."""

    revision = None

    def __init__(self, folder: str) -> None:
        if not Path(folder).is_dir():
            raise UserError(f'--source: {folder} is neither hub nor sample nor a FOLDER that exists; a FOLDER holds files of '
                            f"documents: C4's own, or {', '.join(FORMATS)}")
        self.folder, self.name = Path(folder), str(folder)
        self.paths = sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob('*')
                            if p.name.endswith(FORMATS) and p.is_file())
        self.paths = [p for p in self.paths if not p.startswith('.') and '/.' not in p]  # a downloader keeps its notes there
        self.is_c4 = any(re.match(r'c4-(train|validation)\.', Path(p).name) for p in self.paths)
        self.columns = C4_COLUMNS if self.is_c4 else C4_COLUMNS[:1]

    def files(self, split: str) -> list[SourceFile]:
        def of(names: Iterable[str]) -> list[str]:  # as a word of the path: train/a.jsonl, wiki_validation.parquet
            word = re.compile(rf'(?<![a-z])({"|".join(names)})(?![a-z])', re.IGNORECASE)
            return [p for p in self.paths if word.search(p)]

        found = of(HUB_NAMES[split])
        if split == 'train' and not any(map(of, HUB_NAMES.values())):
            found = self.paths  # a folder that knows no splits
        if not found:
            raise UserError(f'--source: {self.folder} holds no files for the split {split}: expected c4-{HUB_NAMES[split][0]}.'
                            f'*.json.gz, or the word {" or ".join(HUB_NAMES[split])} in the path of a file that ends in '
                            f'{", ".join(FORMATS)}; or leave the split out of --splits')
        names = [Path(p).name for p in found]
        if self.is_c4 and (twice := next((p for p in found if names.count(Path(p).name) > 1), None)):
            others = ' and '.join(str(self.folder / os.path.dirname(p)) for p in found if Path(p).name == Path(twice).name)
            raise UserError(f'--source: {Path(twice).name} lies in {others}; name the folder of one of them')
        try:
            return [_local_file(str(self.folder / p)) for p in found]
        except OSError as error:
            raise UserError(f'--source: {error.filename} cannot be read ({error.strerror}); mend its permissions or the '
                            'disk') from error


def _local_file(path: str) -> SourceFile:
    with open(path, 'rb') as file:
        ends = hashlib.blake2b(file.read(SAMPLED), digest_size=8)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - SAMPLED, 0))
        ends.update(file.read(SAMPLED))
    return SourceFile(path, size, ends.hexdigest())


# ---------------------------------------------------------------- the hub


class HubSource:
    """A data set on the hub. The client of `datasets` says which files make a split; they are fetched whole."""

    def __init__(self, dataset: str = C4, config: Optional[str] = None, revision: Optional[str] = None) -> None:
        from datasets import load_dataset_builder
        from huggingface_hub import HfApi

        self.config = config or ('en' if dataset == C4 else None)
        self.is_c4 = (dataset, self.config) == (C4, 'en')
        self.name = f'{dataset} {self.config or ""}'.strip()
        self.columns = C4_COLUMNS if dataset == C4 else C4_COLUMNS[:1]
        # asked first: `datasets` takes 25 s to find that nobody is there, and does not say so
        retried(lambda: HfApi().dataset_info(dataset, revision=revision, timeout=30), self.name, attempts=3)
        try:
            builder = retried(lambda: load_dataset_builder(dataset, self.config, revision=revision), self.name)
        except UserError:
            raise
        except (ValueError, RuntimeError) as error:  # a config that is not there, no files that are known, a script
            raise UserError(f'--dataset: {self.name}: {public(str(error))}; set --config') from None
        self.splits = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
        urls = [url for files in self.splits.values() for url in files]
        wrong = [url for url in urls if not (url.endswith(FORMATS) and url.startswith('hf://datasets/'))]
        if wrong or not urls:
            raise UserError(f'--dataset: {self.name} consists of files such as {public((wrong or ["none"])[0])}; those that '
                            f'convert are on the hub and end in {", ".join(FORMATS)}; files on this machine are --source FOLDER')
        self.revision = _hub_parts(urls[0])[1]

    def files(self, split: str) -> list[SourceFile]:
        from huggingface_hub import HfApi

        name = next((name for name in HUB_NAMES[split] if name in self.splits), None)
        if name is None:
            raise UserError(f'--splits: {self.name} has no split {" or ".join(HUB_NAMES[split])}; it has: '
                            f'{", ".join(self.splits)}')
        urls = sorted(self.splits[name])
        sizes: dict[str, int] = {}
        for repo, revision, folder in {(*_hub_parts(url)[:2], os.path.dirname(_hub_parts(url)[2])) for url in urls}:
            tree = partial(HfApi().list_repo_tree, repo, folder or None, revision=revision, repo_type='dataset')
            listed = retried(lambda tree=tree: list(tree()), self.name)
            sizes |= {f'hf://datasets/{repo}@{revision}/{e.path}': getattr(e, 'size', 0) for e in listed}
        return [SourceFile(url, sizes.get(url, 0)) for url in urls]


def _hub_parts(url: str) -> tuple[str, str, str]:
    """Repository, revision and path of `hf://datasets/REPOSITORY@REVISION/PATH`."""
    repo, _, rest = url.removeprefix('hf://datasets/').partition('@')
    revision, _, path = rest.partition('/')
    return repo, revision, path


def public(text: str) -> str:
    """A message of others without the secrets that URLs in it carry: user, password, signature."""
    return re.sub(r'(\w+://[^\s?]*)\?[^\s\'")>]*', r'\1?***', re.sub(r'(\w+://)[^/\s@]+@', r'\1***@', text))


def _status(error: Optional[BaseException]) -> Optional[int]:
    """The HTTP status behind an error, which libraries wrap in their own."""
    while error is not None:
        status = getattr(getattr(error, 'response', None), 'status_code', None)
        if status is not None:
            return status
        error = error.__cause__ or error.__context__
    return None


def _nobody_there(error: Optional[BaseException]) -> bool:
    """Whether no connection came about, which is no matter of a bad moment."""
    from httpx import ConnectError, ConnectTimeout  # of huggingface-hub from 1.0 on, which has left requests
    from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

    while error is not None and not isinstance(error, (ConnectTimeoutError, NewConnectionError, ConnectError, ConnectTimeout)):
        error = error.__cause__ or error.__context__
    return error is not None


def retried(call: Callable[[], Any], what: str, attempts: int = ATTEMPTS, setting: str = '--source hub') -> Any:
    """Calls the hub until it answers, waiting longer each time.

    Args:
        call: What to do.
        what: Its object, for messages.
        attempts: Where nobody answers at all; a hub that answers 5xx or 429, or hangs up, is asked ATTEMPTS times.
        setting: Which one `what` belongs to.

    Raises:
        UserError: It did not, or says that there is no such thing, or not for this user.
        OSError: This machine's disk is full or cannot be written.
    """
    from datasets.config import HF_ENDPOINT
    from httpx import HTTPError
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    attempt = 0
    while True:
        attempt += 1
        try:
            return call()
        except (OSError, EOFError, HFValidationError, HTTPError) as error:  # every one of requests, the hub and datasets too
            if getattr(error, 'errno', None) in DISK:
                raise
            reason, status = error, _status(error)
        except RuntimeError as error:  # of hf_xet, which has no class of its own
            if 'scripts are no longer supported' in str(error):
                raise
            reason, status = error, None
        missing = isinstance(reason, (FileNotFoundError, HFValidationError)) and not isinstance(reason, LocalEntryNotFoundError)
        if missing or (status is not None and 400 <= status < 500 and status not in (408, 429)):
            raise UserError(f'{setting}: the hub has no {what}, or not for you: check the name and --revision; for a private '
                            f'or gated data set log in with `hf auth login` or set HF_TOKEN\n{_said(reason)}') from reason
        limit = attempts if status is None and _nobody_there(reason) else ATTEMPTS
        if constants.HF_HUB_OFFLINE or attempt >= limit:
            raise UserError(f'{setting}: cannot reach {what} on the hub: check the network, HF_ENDPOINT '
                            f"({public(HF_ENDPOINT)}) and that HF_HUB_OFFLINE is not set, then run again; or use --source FOLDER "
                            f"with C4's own files, or --source sample, which needs no network\n{_said(reason)}") from reason
        print(f'note: {what}: {_said(reason)}; attempt {attempt} of {limit}', flush=True)
        time.sleep(min(2 ** (attempt - 1), 60))


def _said(error: Exception) -> str:
    return f'{type(error).__name__}: {public(first_line(error))}'


def fetched(file: SourceFile, folder: Path, quiet: bool = True) -> Path:
    """The file on this disk. One of the hub is downloaded below `folder`, and goes on where an earlier attempt was cut.

    Raises:
        UserError: The hub does not give it.
        OSError: The disk is full.
    """
    if not is_url(file.path):
        return Path(file.path)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    (disable_progress_bars if quiet else enable_progress_bars)()  # not one for each worker, over one another
    repo, revision, path = _hub_parts(file.path)
    return Path(retried(lambda: hf_hub_download(repo, path, revision=revision, repo_type='dataset', local_dir=folder), file.path))


# ---------------------------------------------------------------- reading


class Bad(NamedTuple):
    """A document that cannot be used, and why."""
    reason: str
    setting: str = '--source'

    @property
    def error(self) -> UserError:
        """For a conversion that is not told to skip it."""
        return UserError(f'{self.setting}: {self.reason}; or leave such documents out with --skip_bad_docs')


def documents(path: Path, columns: Iterable[str], text_column: str = 'text', where: Optional[str] = None,
              ) -> Iterator[Document | Bad]:
    """The documents of a file in order, each with `columns` as strings; what is none is `Bad`.

    Raises:
        UserError: The file is cut short or damaged, so that what follows is lost; or no document can have the text.
    """
    names = [(column, text_column if column == 'text' else column) for column in columns]
    where, kind = where or str(path), 'row' if path.name.endswith('.parquet') else 'line'
    number = 0

    def bad(reason: str, *setting: str) -> Bad:
        return Bad(f'{where}, {kind} {number} {reason}', *setting)

    try:
        for number, row in _rows(path, [name for _, name in names]):  # noqa: B007  (`bad` reads it)
            if isinstance(row, Bad):
                yield bad(f'{row.reason}; download the file again')
                continue
            if isinstance(row, dict) and text_column not in row:
                yield bad(f'has no field {text_column!r}; it has: {", ".join(row) or "none"}', '--text_column')
                continue
            document: dict[str, Any] = {column: row.get(name) if isinstance(row, dict) else None for column, name in names}
            stamp = document.get('timestamp')
            if isinstance(stamp, datetime):  # parquet has it; C4 has 2019-04-25T12:57:54Z
                document['timestamp'] = stamp.strftime('%Y-%m-%dT%H:%M:%SZ')
            if {*map(type, document.values())} != {str}:
                wrong = [name for column, name in names if not isinstance(document[column], str)]
                yield bad(f'has no string {", ".join(wrong)}; a document is an object with the strings '
                          f'{", ".join(name for _, name in names)}')
            elif not (joined := ''.join(document.values())).isascii() and not _is_unicode(joined):
                yield bad('holds characters that are not Unicode text; download the file again')
            else:
                yield document
    except UserError:
        raise
    except (OSError, EOFError, ValueError, igzip_lib.IsalError) as error:  # pyright: ignore  (its stub has an instance)
        if isinstance(error, OSError) and error.errno:
            raise UserError(f'--source: {where} cannot be read after {kind} {number} ({error.strerror}); mend that, then run '
                            'again') from error
        raise UserError(f'--source: {where} cannot be read after {kind} {number}: it is cut short or damaged ({error}); '
                        'download the file again') from error


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        return False
    return True


def _rows(path: Path, names: list[str]) -> Iterator[tuple[int, Any]]:
    """Number, from 1, and value of each row or line that is not blank."""
    if path.name.endswith('.parquet'):
        from pyarrow import parquet  # its errors are OSError and ValueError

        with parquet.ParquetFile(path) as file:
            known = file.schema_arrow.names
            if names[0] not in known:
                raise UserError(f'--text_column: {path.name} has no column {names[0]!r}; it has: {", ".join(known)}')
            batches = file.iter_batches(1000, columns=[name for name in names if name in known])
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
        return
    with _lines(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            try:
                row = orjson.loads(line)
            except ValueError:
                try:
                    row = json.loads(line)  # what the standard alone refuses: NaN, half a surrogate pair, a byte order mark
                except (ValueError, RecursionError) as error:
                    if number == 1 and re.match(rb'\s*\[\s*(\{|$)', line):
                        raise UserError(f'--source: {path} is one JSON array; write an object a line (jq -c .[] does)') from None
                    row = Bad(f'is not JSON ({error})')
            yield number, row


def _lines(path: Path) -> Any:
    if path.name.endswith(('.gz', '.zst')) and not path.stat().st_size:
        raise EOFError('it is empty')  # which these formats never are
    if path.name.endswith('.gz'):
        return igzip.IGzipFile(path)  # its buffer of 8 KB is all that damage hides before it
    if path.name.endswith('.zst'):
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression='zstd'), 1 << 20)
    return path.open('rb', buffering=1 << 20)

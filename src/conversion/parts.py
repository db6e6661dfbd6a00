"""The conversion of one file of documents into a folder of MDS shards: the unit of work, done wholly or not at all.

The folder of file K of a split is `SPLIT/K`, five digits. It holds streaming's shards and index and, written last, `part.json`
with counts, hashes and the options it was made with. What it holds depends on nothing but the file and the options.
"""

import json
import logging
import os
import re
import shutil
import socket
import struct
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_intdigest

from src.common.errors import DISK_FULL, UserError, first_line
from src.config.data_places import is_missing, is_url
from src.conversion.documents import Document, good_documents
from src.conversion.source_files import SourceFile
from src.conversion.sources import public, read

DOCUMENTS_PER_CALL, TEXT_PER_CALL = 256, 1_000_000  # of the tokenizer: whichever comes first, the latter in characters
PART = 'part.json'
HASH = 'xxh128'  # of files: finds damage, at memory speed
HOST = socket.gethostname()  # and the namespace of its processes' numbers: containers may share the name
if os.path.exists('/proc/self/ns/pid'):
    HOST += f'+{os.stat("/proc/self/ns/pid").st_ino}'


@dataclass(frozen=True)
class Options:
    """What decides the bytes of a part, besides its file."""
    columns: tuple[str, ...]
    text_column: str = 'text'
    concat_tokens: Optional[int] = None  # tokens in a sequence; None: text is stored
    tokenizer: Optional[str] = None  # a hub name or a local folder
    tokenizer_name: Optional[str] = None  # as the user names it
    tokenizer_hash: Optional[str] = None
    compression: Optional[str] = None
    hashes: tuple[str, ...] = ()
    size_limit: Optional[str] = None
    skip_bad_docs: bool = False
    txt_lines: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """What a second run must agree with; where the tokenizer lies is no part of it."""
        found = json.loads(json.dumps(asdict(self)))
        left_out = ('tokenizer', 'tokenizer_name')
        return {k: v for k, v in found.items() if k not in left_out and (k, v) != ('txt_lines', False)}


class Job(NamedTuple):
    """A file and where its shards go."""
    root: str  # SPLIT's folder or URL
    number: int
    file: SourceFile
    options: Options
    max_docs: Optional[int] = None
    documents: Optional[list[Document]] = None  # of the sample, which is in no file

    @property
    def name(self) -> str:
        return f'{self.number:05}'

    @property
    def identity(self) -> dict[str, Any]:
        return {'file': self.file.identity, 'max_docs': self.max_docs, **self.options.identity}


# ---------------------------------------------------------------- where parts go


class Place:
    """A folder or a URL that holds the parts of a split. Remotes are those that streaming writes and reads.

    Attributes:
        remote: Whether it is a URL.
        disk: The folder for what is unfinished: the place itself, or this machine's temporary folder.
    """

    def __init__(self, root: str) -> None:
        self.root, self.remote = root, is_url(root)
        self.disk = Path(tempfile.gettempdir() if self.remote else root).absolute()

    def read(self, name: str) -> Optional[str]:
        """A small file of text; None where there is none."""
        data = self.read_bytes(name)
        return None if data is None else data.decode()

    def read_bytes(self, name: str) -> Optional[bytes]:
        """A small file; None where there is none."""
        if not self.remote:
            path = Path(self.root, name)
            return path.read_bytes() if path.is_file() else None
        from streaming.base.util import retry

        @retry(num_attempts=5)
        def download() -> Optional[bytes]:
            with tempfile.TemporaryDirectory() as folder:
                local = os.path.join(folder, 'file')
                try:
                    _downloader(self.root).download(f'{self.root}/{name}', local)
                except Exception as error:  # each store has classes of its own
                    if is_missing(error):
                        return None
                    raise
                return Path(local).read_bytes()
        try:
            return download()
        except Exception as error:
            raise self._unreachable('read', f'{self.root}/{name}', error) from error

    def listed(self, below: str = '') -> Optional[set[str]]:
        """The names of the files that begin with `below`; None for a folder, or a store that streaming cannot list."""
        if not self.root.startswith(('s3://', 'gs://')):
            return None
        from streaming.base.storage.upload import CloudUploader

        with tempfile.TemporaryDirectory() as empty:
            try:
                keys: Any = CloudUploader.get((empty, self.root), keep_local=True, exist_ok=True).list_objects(below)
            except Exception as error:  # each store has classes of its own
                raise self._unreachable('list', self.root, error) from error
        prefix = self.root.partition('://')[2].partition('/')[2].rstrip('/') + '/'
        return {key.removeprefix(prefix) for key in keys}

    def staging(self, name: str) -> Path:
        """An empty folder for what is unfinished; its name says whose it is."""
        return unfinished(self.disk, name)

    def sweep(self, of_all: bool = False) -> None:
        """Removes what processes of this machine that were killed left unfinished; or what all did, once nothing is missing."""
        for path in chain(self.disk.glob('.*.partial-*'), Path(tempfile.gettempdir()).glob('.*.partial-*')):
            owner = UNFINISHED.fullmatch(path.name)
            here = path.parent == self.disk and not self.remote
            if owner and (of_all and here or owner['host'] == HOST and not _is_alive(int(owner['pid']))):
                shutil.rmtree(path, ignore_errors=True)

    def commit(self, staging: Path, name: str, last: str) -> None:
        """Moves a finished folder to its place; the file `last` says that it is whole."""
        if self.remote:
            self.upload(staging, sorted(set(os.listdir(staging)) - {last}) + [last], f'{self.root}/{name}')
            return
        target, damaged = Path(self.root, name), staging.with_name(f'.old{staging.name}')
        if (target / last).exists():
            target.rename(damaged)
        staging.rename(target)  # fails where the folder has other contents
        shutil.rmtree(damaged, ignore_errors=True)

    def upload(self, folder: Path, names: Iterable[str], url: str) -> None:
        """Sends files in this order. Without any, finds out whether the bucket is there."""
        from streaming.base.storage.upload import CloudUploader

        logging.getLogger('streaming.base.storage.upload').setLevel(logging.ERROR)  # it says that the folder is not empty
        try:
            uploader = CloudUploader.get((str(folder), url), keep_local=True, retry=5, exist_ok=True)
            for name in names:
                uploader.upload_file(name)
        except Exception as error:
            raise self._unreachable('write', url, error) from error

    @staticmethod
    def _unreachable(verb: str, url: str, error: Exception) -> UserError:
        return UserError(f'--out_root: cannot {verb} {public(url)}: {type(error).__name__}: {public(first_line(error))}; check '
                         'the address, the network and the credentials, then run the same command again: it goes on')

    def write(self, name: str, text: str) -> None:
        """A small file, in one step."""
        staging = None
        try:
            staging = self.staging(name)
            (staging / name).write_text(text, 'utf-8')
            if self.remote:
                self.upload(staging, [name], self.root)
            else:
                (staging / name).rename(Path(self.root, name))
        except OSError as error:
            raise UserError(f'--out_root: cannot write {self.root}/{name}: {error.strerror or error}; {_mend(error)}') from error
        finally:
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)


@cache  # its client takes a tenth of a second to make
def _downloader(root: str) -> Any:
    from streaming.base.storage.download import CloudDownloader

    return CloudDownloader.get(root)


UNFINISHED = re.compile(r'\..*\.partial-(?P<host>.*)-(?P<pid>\d+)-[0-9a-f]{8}')


def unfinished(folder: Path, name: str) -> Path:
    """A new, empty folder whose name says which process has it."""
    path = folder / f'.{name}.partial-{HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}'
    path.mkdir(parents=True)
    return path


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


def done(job: Job, listed: Optional[set[str]] = None) -> Optional[dict[str, Any]]:
    """What `part.json` says of a part that is there, whole; None where it is still to be made.

    Args:
        job: Whose part.
        listed: All names in an object store, where they are known already.

    Raises:
        UserError: It was made from another file or with other options, or its folder holds something else.
    """
    place, folder = Place(job.root), Path(job.root, job.name)
    listed = place.listed(f'{job.name}/') if listed is None else listed
    if listed is not None and f'{job.name}/{PART}' not in listed:
        return None
    text = place.read(f'{job.name}/{PART}')
    if text is None and not place.remote and folder.exists() and os.listdir(folder):
        text = place.read(f'{job.name}/{PART}')  # another machine may have finished it between the two looks
        if text is None:
            raise UserError(f'--out_root: {folder} holds no {PART}, so it is no part that this program finished; delete it, or '
                            'name another --out_root')
    if text is None:
        return None
    try:
        part = json.loads(text)
        old, files = dict(part['made_from']), part['files']
    except (ValueError, KeyError, TypeError):
        return None  # damaged: made anew
    new = job.identity
    if not part.get('bad_documents'):  # then this option has changed nothing
        old['skip_bad_docs'] = new['skip_bad_docs']
    if old != new:
        differ = ', '.join(f'{k} {old.get(k)!r}, now {v!r}' for k, v in new.items() if old.get(k) != v)
        raise UserError(f'--out_root: {job.root}/{job.name} was made with {differ}; use the same options (and --revision) to go '
                        f'on, name another --out_root, or delete {job.root}')
    if listed is not None and not {f'{job.name}/{name}' for name in files} <= listed:
        return None
    if not place.remote and any(not (p := folder / name).is_file() or p.stat().st_size != info['bytes']
                                for name, info in files.items()):
        return None
    return part


def all_done(jobs: list[Job]) -> list[Optional[dict[str, Any]]]:
    """`done` of each, side by side: on an object store each takes its time."""
    listed = Place(jobs[0].root).listed()
    with ThreadPoolExecutor(16) as threads:
        return list(threads.map(lambda job: done(job, listed), jobs))


# ---------------------------------------------------------------- tokens


def token_dtype(tokenizer: Any) -> np.dtype:
    """The smallest type that holds every id of a tokenizer, added ones too."""
    return np.min_scalar_type(max(tokenizer.get_vocab().values()))


class Packer:
    """Joins documents, each closed by EOS, and cuts them into sequences of `length` tokens."""

    def __init__(self, length: int, eos: int, dtype: np.dtype) -> None:
        self.length, self.eos, self.dtype = length, eos, dtype
        self.rest: NDArray = np.empty(0, dtype)

    def add(self, tokens: list[NDArray]) -> NDArray:
        """Full sequences, of shape (n, length)."""
        stream = np.concatenate([self.rest, *tokens], dtype=self.dtype, casting='unsafe')
        n = len(stream) // self.length * self.length
        self.rest = stream[n:].copy()  # a view would keep the whole stream
        return stream[:n].reshape(-1, self.length)

    def finish(self) -> NDArray:
        """The last sequence, of shape (0 or 1, length), filled up with EOS: no token is dropped."""
        if not len(self.rest):
            return self.rest.reshape(0, self.length)
        fill = np.full(self.length - len(self.rest), self.eos, self.dtype)
        return np.concatenate([self.rest, fill])[None]


# ---------------------------------------------------------------- the work


def convert(job: Job) -> dict[str, Any]:
    """Makes a part, unless it is there.

    Returns:
        What its `part.json` says.

    Raises:
        UserError: The file or the disk does not do. Nothing of the part is left, what was finished before stays.
    """
    if part := done(job):
        return part
    place, staging = Place(job.root), None
    try:
        staging = place.staging(job.name)
        counts = _write(job, staging)
        files = folder_info(staging)
        part = {'made_from': job.identity, **counts, 'files': files}
        (staging / PART).write_text(json.dumps(part, sort_keys=True), 'utf-8')
        if not done(job):  # by another run at the same time
            place.commit(staging, job.name, PART)
        return part
    except OSError as error:  # sources turn their own into UserError: this one comes from writing
        if part := done(job):  # another run was faster and cleared up
            return part
        raise UserError(f'--out_root: cannot write {job.root}/{job.name} on {place.disk}: {error.strerror or error}; the '
                        f'unfinished part was removed, what was finished before is untouched. {_mend(error)}, then run the same '
                        'command again: it goes on') from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _mend(error: OSError) -> str:
    return 'Free space' if error.errno in DISK_FULL else 'Mend the disk or its permissions'


def file_info(path: Path) -> dict[str, Any]:
    """Size and hash of a file."""
    from streaming.base.hashing import get_hash

    data = path.read_bytes()
    return {'bytes': len(data), HASH: get_hash(HASH, data)}


def folder_info(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of each file of a folder."""
    return {path.name: file_info(path) for path in sorted(folder.iterdir())}


def _write(job: Job, out: Path) -> dict[str, Any]:
    """Writes shards and index; returns the counts."""
    o = job.options
    counts = {'documents': 0, 'text_bytes': 0, 'bad_documents': 0}
    texts_hash = 0

    def good() -> Iterator[Document]:
        nonlocal texts_hash
        for document in _documents(job, out / 'source', counts):
            text = document['text'].encode()
            counts['documents'] += 1
            counts['text_bytes'] += len(text)
            texts_hash += xxh3_128_intdigest(text)
            yield document

    columns, rows = dict.fromkeys(o.columns, 'str'), good()
    if o.concat_tokens:
        counts['tokens'] = 0
        tokenizer = _tokenizer(o.tokenizer, o.concat_tokens)
        columns = {'tokens': f'ndarray:{token_dtype(tokenizer).name}:{o.concat_tokens}'}
        rows = ({'tokens': row} for row in _packed(good(), tokenizer, o.concat_tokens, counts))
    writer = _shard_writer(str(out / 'shards'), columns, o)
    for row in rows:
        writer.write(row)
    writer.finish()  # not `with`, which would end well after an error
    for path in (out / 'shards').iterdir():
        path.rename(out / path.name)
    (out / 'shards').rmdir()
    shutil.rmtree(out / 'source', ignore_errors=True)
    return counts | {'texts_hash': f'{texts_hash % 2**128:032x}'}


def _shard_writer(folder: str, columns: dict[str, str], o: Options) -> Any:
    from streaming import MDSWriter

    class ShardWriter(MDSWriter):
        def encode_sample(self, sample: dict[str, Any]) -> bytes:
            if not is_text:
                return super().encode_sample(sample)
            # The same bytes; looking each column's encoding up for each sample would be a third of a conversion's time.
            data = [sample[name].encode() for name in self.column_names]
            return struct.pack(f'<{len(data)}I', *map(len, data)) + b''.join(data)

        def flush_shard(self) -> None:
            if self.new_samples:  # else a sample larger than a shard would leave an empty one before it
                super().flush_shard()

        def _process_file(self, raw_data: bytes, raw_basename: str, zip_basename: Optional[str]) -> tuple[dict, Optional[dict]]:
            raw, zipped = super()._process_file(raw_data, raw_basename, zip_basename)
            if zip_basename and zip_basename.endswith('.gz'):  # bytes 4 to 8 are the time
                path = Path(self.local, zip_basename)
                data = path.read_bytes()
                path.write_bytes(data := data[:4] + bytes(4) + data[8:])
                zipped = self._hash(data, zip_basename)
            return raw, zipped

    is_text = set(columns.values()) == {'str'}
    limit: dict[str, Any] = {'size_limit': o.size_limit} if o.size_limit else {}
    return ShardWriter(out=folder, columns=columns, compression=o.compression, hashes=list(o.hashes), **limit)


def _documents(job: Job, folder: Path, counts: dict[str, int]) -> Iterator[Document]:
    o, found = job.options, job.documents
    if found is None:
        folder.mkdir()
        found = read(job.file, folder, o.columns, o.text_column, o.txt_lines)
    yield from islice(good_documents(found, o.skip_bad_docs, counts), job.max_docs)


@cache
def _tokenizer(name: Optional[str], length: int) -> Any:
    from src.tokenizer import HFTokenizer

    os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # processes are the parallelism
    return HFTokenizer(name or '', length).tokenizer


def _packed(found: Iterator[Document], tokenizer: Any, length: int, counts: dict[str, int]) -> Iterator[NDArray]:
    from src.tokenizer import encode_documents

    packer = Packer(length, tokenizer.eos_token_id, token_dtype(tokenizer))
    for texts in _calls(found):
        tokens = encode_documents(tokenizer, texts)
        counts['tokens'] += sum(map(len, tokens))
        rows = packer.add(tokens)
        del tokens  # of a long document, they are large
        yield from rows
    yield from packer.finish()


def _calls(found: Iterator[Document]) -> Iterator[list[str]]:
    """The texts for each call of the tokenizer, which takes a hundred bytes of memory for a byte of text."""
    texts, size = [], 0
    for document in found:
        texts.append(document['text'])
        size += len(texts[-1])
        if len(texts) == DOCUMENTS_PER_CALL or size >= TEXT_PER_CALL:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts

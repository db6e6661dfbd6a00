"""Converts one file of documents into a part: a folder of MDS shards, which appears only when it is complete.

The folder of file K of a split is `SPLIT/K`, with five digits. It holds streaming's shards and index and, written last,
`part.json`, with the counts, the hashes, and the options it was made with. Its bytes depend only on the file and the
options.
"""

import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Optional

from xxhash import xxh3_128, xxh3_128_intdigest

from src.common.errors import UserError
from src.common.workers import map_in_threads
from src.conversion.documents import Document, good_documents
from src.conversion.output import RemoteOutput, open_output, read_if_exists, unfinished_folder
from src.conversion.shards import Options, write_shards
from src.conversion.source_files import SourceFile
from src.conversion.sources import read_source_file

PART = 'part.json'
HASH = 'xxh128'  # the hash of files: it finds damage, as fast as memory is read
LONG_TEXT = 1_000_000  # characters
Part = dict[str, Any]  # the contents of `part.json`


class Job(NamedTuple):
    """A file to convert, and the place for its shards."""
    root: str  # folder or URL of the split
    number: int
    file: SourceFile
    options: Options
    max_docs: Optional[int] = None
    documents: Optional[list[Document]] = None  # the sample's, which are in no file

    @property
    def name(self) -> str:
        return f'{self.number:05}'

    @property
    def identity(self) -> dict[str, Any]:
        """The file and the options that decide the bytes of the part."""
        return {'file': self.file.identity, 'max_docs': self.max_docs, **self.options.identity}


def finished_part(job: Job, stored_names: Optional[set[str]] = None) -> Optional[Part]:
    """Returns `part.json` of a part that is complete; None where the part has still to be made.

    `stored_names` are the names of all files in the object store, if they are known already. Raises UserError if the
    part was made from another file or with other options, or its folder holds something else.
    """
    output, folder = open_output(job.root), Path(job.root, job.name)
    stored_names = output.list_names(f'{job.name}/') if stored_names is None else stored_names
    if stored_names is not None and f'{job.name}/{PART}' not in stored_names:
        return None
    # Look at the folder before `part.json`: in between, another machine may move its finished part here.
    is_occupied = not output.remote and folder.is_dir() and any(folder.iterdir())
    text = read_if_exists(output, f'{job.name}/{PART}')
    if text is None and is_occupied:
        raise UserError(f'--out_root: {folder} holds no {PART}, so this program did not finish it; delete it, or name '
                        'another --out_root')
    try:
        part = json.loads(text or '')
        made_from, files = dict(part['made_from']), part['files']
    except (ValueError, KeyError, TypeError):
        return None  # missing or damaged
    _check_same_options(job, made_from, bool(part.get('bad_documents')))
    if isinstance(output, RemoteOutput):
        is_whole = stored_names is None or {f'{job.name}/{name}' for name in files} <= stored_names
    else:
        is_whole = all(output.size(f'{job.name}/{name}') == info['bytes'] for name, info in files.items())
    return part if is_whole else None


def _check_same_options(job: Job, old: dict[str, Any], has_skipped: bool) -> None:
    """Raises UserError if a part was made from another file or with other options."""
    new = job.identity
    if not has_skipped:  # without bad documents, this option changes nothing
        old['skip_bad_docs'] = new['skip_bad_docs']
    if old != new:
        differ = ', '.join(f'{k} {old.get(k)!r}, now {v!r}' for k, v in new.items() if old.get(k) != v)
        raise UserError(f'--out_root: {job.root}/{job.name} was made with {differ}; use the same options (and '
                        f'--revision) to continue, name another --out_root, or delete {job.root}')


def finished_parts(jobs: list[Job]) -> list[Optional[Part]]:
    """Calls `finished_part` for each job, in threads, since an object store is slow to answer."""
    stored_names = open_output(jobs[0].root).list_names()
    return map_in_threads(lambda job: finished_part(job, stored_names), jobs)


def convert(job: Job) -> Part:
    """Makes a part, unless it is complete already, and returns its `part.json`.

    Raises UserError if the file cannot be read or the disk cannot be written. Then nothing of the part is left;
    finished parts stay.
    """
    if part := finished_part(job):
        return part
    output = open_output(job.root)
    try:
        with unfinished_folder(output, job.name) as folder:
            counts = _write_part(job, folder)
            part = {'made_from': job.identity, **counts, 'files': folder_info(folder)}
            (folder / PART).write_text(json.dumps(part, sort_keys=True), 'utf-8')
            if not finished_part(job):  # another run may have finished it meanwhile
                output.commit(folder, job.name, PART)
            return part
    except UserError as error:
        if isinstance(error.__cause__, OSError) and (part := finished_part(job)):  # another run was faster
            return part
        raise


def _write_part(job: Job, folder: Path) -> dict[str, Any]:
    """Writes the shards and their index to `folder`; returns the counts."""
    counts = {'documents': 0, 'text_bytes': 0, 'bad_documents': 0}
    texts_hash, o = 0, job.options

    def documents() -> Iterator[Document]:
        nonlocal texts_hash
        found = job.documents
        if found is None:
            found = read_source_file(job.file, folder / 'source', o.columns, o.text_column, o.txt_lines)
        for document in islice(good_documents(found, o.skip_bad_docs, counts), job.max_docs):
            n_bytes, text_hash = _measure(document['text'])
            counts['documents'] += 1
            counts['text_bytes'] += n_bytes
            texts_hash += text_hash
            yield document

    write_shards(documents(), folder / 'shards', o, counts)
    for path in (folder / 'shards').iterdir():
        path.rename(folder / path.name)
    (folder / 'shards').rmdir()
    shutil.rmtree(folder / 'source', ignore_errors=True)
    return counts | {'texts_hash': f'{texts_hash % 2**128:032x}'}


def _measure(text: str) -> tuple[int, int]:
    """Returns the bytes of a text in UTF-8, and their hash. A long text is encoded in pieces, which saves memory."""
    if len(text) <= LONG_TEXT:
        data = text.encode()
        return len(data), xxh3_128_intdigest(data)
    n_bytes, whole = 0, xxh3_128()
    for start in range(0, len(text), LONG_TEXT):
        data = text[start:start + LONG_TEXT].encode()
        n_bytes += len(data)
        whole.update(data)
    return n_bytes, whole.intdigest()


def file_info(path: Path) -> dict[str, Any]:
    """Returns the size and the hash of a file."""
    whole = xxh3_128()
    with path.open('rb') as file:
        while data := file.read(1 << 20):
            whole.update(data)
    return {'bytes': path.stat().st_size, HASH: whole.hexdigest()}


def folder_info(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the size and the hash of each file in a folder."""
    return {path.name: file_info(path) for path in sorted(folder.iterdir())}

"""The conversion of one file of documents into a folder of MDS shards: the unit of work, done wholly or not at all.

The folder of file K of a split is `SPLIT/K`, five digits. It holds streaming's shards and index and, written last,
`part.json` with counts, hashes and the options it was made with. What it holds depends on nothing but the file and the
options.
"""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Optional

from xxhash import xxh3_128_intdigest, xxh128_hexdigest

from src.common.errors import UserError
from src.conversion.documents import Document, good_documents
from src.conversion.output import RemoteOutput, open_output, read_if_exists, unfinished_folder
from src.conversion.shards import Options, write_shards
from src.conversion.source_files import SourceFile
from src.conversion.sources import read

PART = 'part.json'
HASH = 'xxh128'  # of files: finds damage, at memory speed
Part = dict[str, Any]  # what `part.json` says


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


def finished_part(job: Job, listed: Optional[set[str]] = None) -> Optional[Part]:
    """What `part.json` says of a part that is there, whole; None where it is still to be made.

    `listed` are all names in an object store, where they are known already. Raises UserError where the part was made
    from another file or with other options, or its folder holds something else.
    """
    output, folder = open_output(job.root), Path(job.root, job.name)
    listed = output.listed(f'{job.name}/') if listed is None else listed
    if listed is not None and f'{job.name}/{PART}' not in listed:
        return None
    # This look first: between the two, another machine may finish the part, which moves it here in one step.
    occupied = not output.remote and folder.is_dir() and any(folder.iterdir())
    text = read_if_exists(output, f'{job.name}/{PART}')
    if text is None and occupied:
        raise UserError(f'--out_root: {folder} holds no {PART}, so it is no part that this program finished; delete '
                        'it, or name another --out_root')
    try:
        part = json.loads(text or '')
        made_from, files = dict(part['made_from']), part['files']
    except (ValueError, KeyError, TypeError):
        return None  # missing, or damaged: made anew
    _check_same(job, made_from, bool(part.get('bad_documents')))
    if isinstance(output, RemoteOutput):
        whole = listed is None or {f'{job.name}/{name}' for name in files} <= listed
    else:
        whole = all(output.size(f'{job.name}/{name}') == info['bytes'] for name, info in files.items())
    return part if whole else None


def _check_same(job: Job, old: dict[str, Any], skipped: bool) -> None:
    """Refuses a part that is of another file, or that was made with other options."""
    new = job.identity
    if not skipped:  # then this option has changed nothing
        old['skip_bad_docs'] = new['skip_bad_docs']
    if old != new:
        differ = ', '.join(f'{k} {old.get(k)!r}, now {v!r}' for k, v in new.items() if old.get(k) != v)
        raise UserError(f'--out_root: {job.root}/{job.name} was made with {differ}; use the same options (and '
                        f'--revision) to go on, name another --out_root, or delete {job.root}')


def finished_parts(jobs: list[Job]) -> list[Optional[Part]]:
    """`done` of each, side by side: on an object store each takes its time."""
    listed = open_output(jobs[0].root).listed()
    with ThreadPoolExecutor(16) as threads:
        return list(threads.map(lambda job: finished_part(job, listed), jobs))


def convert(job: Job) -> Part:
    """Makes a part, unless it is there, and returns what its `part.json` says.

    Raises UserError where the file or the disk does not do. Then nothing of the part is left, and what was finished
    before stays.
    """
    if part := finished_part(job):
        return part
    output = open_output(job.root)
    try:
        with unfinished_folder(output, job.name) as folder:
            counts = _write(job, folder)
            part = {'made_from': job.identity, **counts, 'files': folder_info(folder)}
            (folder / PART).write_text(json.dumps(part, sort_keys=True), 'utf-8')
            if not finished_part(job):  # by another run at the same time
                output.commit(folder, job.name, PART)
            return part
    except UserError as error:
        if isinstance(error.__cause__, OSError) and (part := finished_part(job)):  # another run was faster
            return part
        raise


def _write(job: Job, folder: Path) -> dict[str, Any]:
    """Writes shards and index; returns the counts."""
    counts = {'documents': 0, 'text_bytes': 0, 'bad_documents': 0}
    texts_hash, o = 0, job.options

    def documents() -> Iterator[Document]:
        nonlocal texts_hash
        of_file = job.documents
        if of_file is None:
            of_file = read(job.file, folder / 'source', o.columns, o.text_column, o.txt_lines)
        for document in islice(good_documents(of_file, o.skip_bad_docs, counts), job.max_docs):
            text = document['text'].encode()
            counts['documents'] += 1
            counts['text_bytes'] += len(text)
            texts_hash += xxh3_128_intdigest(text)
            yield document

    write_shards(documents(), folder / 'shards', o, counts)
    for path in (folder / 'shards').iterdir():
        path.rename(folder / path.name)
    (folder / 'shards').rmdir()
    shutil.rmtree(folder / 'source', ignore_errors=True)
    return counts | {'texts_hash': f'{texts_hash % 2**128:032x}'}


def file_info(path: Path) -> dict[str, Any]:
    """Size and hash of a file."""
    data = path.read_bytes()
    return {'bytes': len(data), HASH: xxh128_hexdigest(data)}


def folder_info(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of each file of a folder."""
    return {path.name: file_info(path) for path in sorted(folder.iterdir())}

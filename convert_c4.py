"""Writes C4 as streaming shards: `python convert_c4.py --out_root ./my-copy-c4 --splits val`.

Every split becomes a folder of MDS shards with the string columns `text`, `timestamp` and `url`, exactly as C4 has them.
It is written beside its place and renamed into it when whole, so a split is either there and finished or not there.
"""

import argparse
import asyncio
import gzip
import json
import os
import shutil
import signal
import sys
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Optional

from src.errors import UserError

COLUMNS = {'text': 'str', 'timestamp': 'str', 'url': 'str'}


class Split(NamedTuple):
    """How C4 (config `en`) names and counts one of its splits."""
    hub_name: str
    files: int
    documents: int


SPLITS = {'train': Split('train', 1024, 364_868_892), 'val': Split('validation', 8, 364_608)}


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line. Leaves the process with status 2 and a usage line when it cannot be read."""
    parser = argparse.ArgumentParser(description='Write C4 as shards that mosaicml-streaming reads.')
    parser.add_argument('--out_root', required=True, metavar='DIR', help='the splits become DIR/train and DIR/val')
    parser.add_argument('--splits', nargs='+', choices=list(SPLITS), default=list(SPLITS), help='default: both')
    parser.add_argument('--source', default='hub', metavar='hub|sample|FOLDER',
                        help='hub: allenai/c4 from the Hugging Face hub (default); sample: English prose out of the Python '
                        'installation, with a tokenizer of 4096 tokens in DIR/tokenizer, no network needed; FOLDER: a folder '
                        "that holds C4's own files, such as c4-train.00000-of-01024.json.gz")
    return parser.parse_args(argv)


def check_out_root(out_root: str, splits: Iterable[str]) -> Path:
    """Makes the output folder and refuses one that cannot take every split, before any work is done."""
    if '://' in out_root:
        raise UserError(f'--out_root: {out_root} is not a local folder; convert into one, then upload that')
    root = Path(out_root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        held = [str(root / split) for split in splits if (root / split).exists() and os.listdir(root / split)]
    except OSError as error:
        raise UserError(f'--out_root: {error.filename} is a file or cannot be made ({error.strerror}); '
                        'name a folder that may be written') from error
    if not os.access(root, os.W_OK | os.X_OK):
        raise UserError(f'--out_root: {root} may not be written; change its permissions or name another folder')
    if held:
        raise UserError(f'--out_root: {", ".join(held)} already there and not empty; nothing was written. '
                        'Leave it out of --splits, name another --out_root, or delete it')
    for leftover in sorted(root.glob('.*.partial-*')):
        print(f'note: {leftover} belongs to another run; delete it if that run was killed')
    return root


def check_document(document: Any, where: str) -> dict[str, str]:
    """The three columns of a document. C4 has all three in every document, so one without them is an error."""
    fields: dict[str, Any] = {name: document.get(name) if isinstance(document, dict) else None for name in COLUMNS}
    if isinstance(fields['timestamp'], datetime):  # the JSON reader of `datasets` parses it; C4 has 2019-04-25T12:57:54Z
        fields['timestamp'] = fields['timestamp'].strftime('%Y-%m-%dT%H:%M:%SZ')
    wrong = [name for name, value in fields.items() if not isinstance(value, str)]
    if wrong:
        raise UserError(f'{where} has no string {", ".join(wrong)}; a C4 document is a JSON object with the strings '
                        f'{", ".join(COLUMNS)}')
    try:
        ''.join(fields.values()).encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise UserError(f'{where} holds characters that are not Unicode text ({error}); download the file again') from error
    return fields


def file_documents(path: Path) -> Iterator[dict[str, str]]:
    """The documents of one C4 file: gzip, one JSON object a line."""
    number = 0
    try:
        with gzip.open(path, 'rb') as lines:
            for number, line in enumerate(lines, start=1):  # noqa: B007  (`number` is read below)
                where = f'--source: {path}, line {number}'
                try:
                    document = json.loads(line)
                except ValueError as error:
                    raise UserError(f'{where} is not JSON ({error}); download the file again') from error
                yield check_document(document, where)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f'--source: {path} cannot be read after line {number}: it is cut short or damaged ({error}); '
                        'download the file again') from error


def folder_files(folder: str, split: str) -> list[Path]:
    """The files of one split, sorted by name; each is a shard of the conversion."""
    pattern = f'c4-{SPLITS[split].hub_name}.*.json.gz'
    if not Path(folder).is_dir():
        raise UserError(f'--source: {folder} is neither hub nor sample nor a FOLDER that exists; a FOLDER holds C4\'s own files, '
                        f'{pattern}')
    files = sorted(Path(folder).glob(pattern))
    if not files:
        raise UserError(f'--source: {folder} holds no {pattern} for the split {split}; expected files such as '
                        f'c4-{SPLITS[split].hub_name}.00000-of-{SPLITS[split].files:05}.json.gz')
    print(f'{split}: {len(files)} of the {SPLITS[split].files:,} files of C4 in {folder}')
    return files


def hub_documents(split: str) -> Iterator[dict[str, str]]:
    """The documents of one split, streamed from the Hugging Face hub."""
    import aiohttp
    from datasets import config, load_dataset
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    number = 0
    mend = (f'check the network, HF_ENDPOINT ({config.HF_ENDPOINT}) and that HF_HUB_OFFLINE is not set, then run again; or use '
            "--source FOLDER with C4's own files, or --source sample, which needs no network")
    try:
        stream = load_dataset('allenai/c4', 'en', split=SPLITS[split].hub_name, streaming=True)
        for number, document in enumerate(stream, start=1):
            yield check_document(document, f'--source hub: {split}, document {number}')
    # OSError covers ConnectionError, requests' and the hub's HTTP errors, offline mode, and a data set that is not there.
    except (OSError, asyncio.TimeoutError, aiohttp.ClientError) as error:
        what = f'lost the hub after {number:,} documents of {split}' if number else 'cannot reach allenai/c4 on the hub'
        raise UserError(f'--source hub: {what}: {mend}\n{type(error).__name__}: {error}') from error
    except (EOFError, zlib.error, ArrowException, DatasetsError) as error:
        raise UserError(f'--source hub: unreadable data after {number:,} documents of {split}: {mend}\n'
                        f'{type(error).__name__}: {error}') from error


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that is renamed to it when the block ends well and removed when it does not."""
    partial = target.with_name(f'.{target.name}.partial-{uuid.uuid4().hex[:8]}')
    try:
        partial.mkdir()
        yield partial
        partial.rename(target)
    except OSError as error:  # sources turn their own into UserError: this one comes from writing
        raise UserError(f'--out_root: cannot write {target}: {error.strerror or error}; the unfinished {target.name} was '
                        'removed, what was finished before is untouched. Free space or mend the disk, then run again') from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_split(target: Path, documents: Iterable[dict[str, str]], expected: Optional[int]) -> None:
    """Writes the folder `target`, whole or not at all.

    Args:
        target: The split's folder.
        documents: What it shall hold, in order.
        expected: Number of documents for the progress bar; None where it is not known.
    """
    from streaming import MDSWriter
    from tqdm import tqdm

    start, count, size = time.perf_counter(), 0, 0
    with staged(target) as partial:
        writer = MDSWriter(out=str(partial), columns=COLUMNS)  # not `with`: on an error that would write an index all the same
        for document in tqdm(documents, desc=target.name, total=expected, unit=' documents', unit_scale=True):
            writer.write(document)
            count += 1
            size += len(document['text'].encode())
        if not count:
            raise UserError(f'--source: no documents for {target.name}')
        writer.finish()
    print(f'{target}: {count:,} documents, {size:,} bytes of text, {time.perf_counter() - start:.1f} seconds')
    if expected not in (None, count):
        print(f'note: C4 has {expected:,} documents in {target.name}; the source gave {count:,}')


def write_tokenizer(target: Path, texts: Iterable[str]) -> None:
    """Trains the sample's tokenizer. One that is there already is kept, since splits may be tokenized with it."""
    from src.sample_corpus import train_tokenizer

    if (target / 'tokenizer.json').exists():
        print(f'{target}: kept, it was there before')
        return
    with staged(target) as partial:
        train_tokenizer(texts, partial)
    print(f'{target}: trained on the train split')


def main(args: argparse.Namespace) -> None:
    """Converts the splits one after another.

    Args:
        args: From `parse_args`.

    Raises:
        UserError: A source or an output folder that does not do, or a disk that is full. No part of a split is left behind.
    """
    splits = list(dict.fromkeys(args.splits))
    out_root = check_out_root(args.out_root, splits)
    sources: dict[str, tuple[Iterable[dict[str, str]], Optional[int]]] = {}
    if args.source == 'hub':
        sources = {split: (hub_documents(split), SPLITS[split].documents) for split in splits}
    elif args.source == 'sample':
        from src.sample_corpus import gather
        print('gathering the sample corpus (about 15 seconds)')
        corpus = gather()
        write_tokenizer(out_root / 'tokenizer', (document['text'] for document in corpus['train']))
        sources = {split: (corpus[split], len(corpus[split])) for split in splits}
    else:
        for split in splits:
            files = folder_files(args.source, split)
            expected = SPLITS[split].documents if len(files) == SPLITS[split].files else None
            sources[split] = ((document for path in files for document in file_documents(path)), expected)
    for split in splits:
        write_split(out_root / split, *sources[split])
    if args.source == 'sample':
        elsewhere = '' if out_root == Path('my-copy-c4') else f' data_remote={out_root}'  # where the YAML looks for it
        print(f'next: composer main.py yamls/quickstart.yaml{elsewhere}')
    else:
        print(f'next: python src/data_c4.py {out_root} {out_root}')


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that an unfinished split is removed
    try:
        main(parse_args(sys.argv[1:]))
    except UserError as user_error:
        sys.exit(f'error: {user_error}')
    except KeyboardInterrupt:
        print('\ninterrupted: the unfinished split was removed, finished ones are untouched', file=sys.stderr)
        sys.exit(130)

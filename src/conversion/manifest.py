"""What closes a split: one index over its parts and a manifest of all files; and the check of a copy against it."""

import json
import logging
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Optional

from src.common.errors import UserError
from src.common.progress import progress
from src.conversion.parts import HASH, PART, Job, Place, all_done, file_info
from src.conversion.sources import Source

INDEX, MANIFEST, TRAINED = 'index.json', 'manifest.json', 'trained.json'  # the last: of a tokenizer


def merge(split: str, jobs: list[Job], source: Source) -> dict[str, Any]:
    """Writes the index, by streaming's own function, then the manifest.

    Returns:
        The manifest.

    Raises:
        UserError: Parts are missing, or none holds a document.
    """
    from streaming.base.hashing import get_hash
    from streaming.base.util import merge_index

    place = Place(jobs[0].root)
    there = all_done(jobs)
    missing = [job.name for job, part in zip(jobs, there, strict=True) if part is None]
    if missing:
        shown = ', '.join(missing[:10]) + (', ...' if len(missing) > 10 else '')
        raise UserError(f'--merge: {place.root}: {len(missing)} of {len(jobs)} parts are missing: {shown}; run their '
                        '--partition, or the same command without --partition and --merge')
    parts = [part for part in there if part is not None]
    full = [(job, part) for job, part in zip(jobs, parts, strict=True) if part['documents']]
    if not full:
        raise UserError(f'--source: no documents for {split}')

    with tempfile.TemporaryDirectory() as folder:
        def copied(job: Job) -> str:  # of a remote; and a local path may hold what merge_index takes for a URL
            local = Path(folder, 'parts', job.name, INDEX)
            local.parent.mkdir(parents=True)
            text = place.read(f'{job.name}/{INDEX}')
            if text is None:
                raise UserError(f'--out_root: {place.root}/{job.name}/{INDEX} is missing; delete {place.root}/{job.name}, then '
                                'run the same command again: it makes that part anew')
            local.write_text(text, 'utf-8')
            return str(local)

        with ThreadPoolExecutor(16) as threads:
            indexes = list(threads.map(copied, [job for job, _ in full]))
        logging.disable(logging.WARNING)  # it says where its temporary files are
        try:
            merge_index(indexes, f'{folder}/merged')
        finally:
            logging.disable(logging.NOTSET)
        index = Path(folder, 'merged', INDEX).read_text('utf-8')

    counted = [key for key in ('documents', 'text_bytes', 'bad_documents', 'tokens') if key in parts[0]]
    total: dict[str, Any] = {key: sum(part[key] for part in parts) for key in counted}
    total['texts_hash'] = f'{sum(int(part["texts_hash"], 16) for part in parts) % 2**128:032x}'
    files = {INDEX: {'bytes': len(index.encode()), HASH: get_hash(HASH, index.encode())}}
    files |= {f'{job.name}/{name}': info for job, part in full for name, info in part['files'].items()}
    manifest = {'version': 1, 'source': source.name, 'revision': source.revision, 'split': split,
                'options': {'max_docs': jobs[0].max_docs, **jobs[0].options.identity},
                'tokenizer_name': jobs[0].options.tokenizer_name, **total, 'files': files}
    place.write(INDEX, index)
    place.write(MANIFEST, json.dumps(manifest, indent=1))
    place.sweep(of_all=True)
    return manifest


def check_strangers(root: str, n_parts: int) -> None:
    """Refuses a split that holds other data than its parts.

    Raises:
        UserError: Names what is there.
    """
    place, folder = Place(root), Path(root)
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith('.')) if folder.is_dir() else []
    if place.remote:
        names = sorted({name.partition('/')[0] for name in place.listed() or ()})
    parts = _parts(names)
    strange = [name for name in names if name not in (INDEX, MANIFEST, *parts)]
    if strange or INDEX in names and not parts and MANIFEST not in names or place.remote and _is_of_others(place.read(INDEX)):
        raise UserError(f'--out_root: {root} already there and not empty: it holds {(strange or names or [INDEX])[0]}, which is '
                        'not of this program; nothing was written. Leave it out of --splits, name another --out_root, or '
                        'delete it')
    if f'{n_parts:05}' in parts or place.remote and not names and place.read(f'{n_parts:05}/{PART}'):
        raise UserError(f'--out_root: {root} holds the part {n_parts:05}, and the source has only {n_parts} files for it: it was '
                        f'made from more; use that source, name another --out_root, or delete {root}')


def _parts(names: list[str]) -> list[str]:
    return [name for name in names if name.isdecimal() and len(name) >= 5]


def _is_of_others(index: Optional[str]) -> bool:
    """Whether an index points to shards that are in no part."""
    try:
        shards = json.loads(index)['shards'] if index else []
        return any('/' not in (shard['zip_data'] or shard['raw_data'])['basename'] for shard in shards)
    except (ValueError, KeyError, TypeError):
        return True


def verify(root: str) -> list[str]:
    """Checks each split below a folder, or one split, against its manifest, and a tokenizer that was trained with them.

    Returns:
        A line for each file that is missing, cut short or changed, and for each split that was not finished.

    Raises:
        UserError: There is no manifest, or it is damaged.
    """
    manifests = sorted(Path(root).glob(f'*/{MANIFEST}')) or sorted(Path(root).glob(MANIFEST))
    if not manifests:
        raise UserError(f'--verify: {root} holds no SPLIT/{MANIFEST}: it is no folder that this program finished. Name one on '
                        'this machine; to make or finish one, give --out_root')
    damage = [f'{folder}: has no {MANIFEST}, so it was not finished' for folder in sorted(Path(root).iterdir())
              if folder.is_dir() and not (folder / MANIFEST).exists() and _parts(os.listdir(folder))]
    manifests += Path(root).glob(f'tokenizer/{TRAINED}')
    for path in manifests:
        try:
            manifest = json.loads(path.read_text('utf-8'))
            files = {name: {'bytes': int(info['bytes']), HASH: info[HASH]} for name, info in manifest['files'].items()}
            made = 'tokenizer' if path.name == TRAINED else f'{manifest["documents"]:,} documents'
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f'--verify: {path} is damaged ({error}); run the command that made the split: it writes it '
                            'anew') from error
        bad, checked = [], [(path.parent / name, info) for name, info in files.items()]
        with ThreadPoolExecutor(4) as threads, progress(str(path.parent), sum(info['bytes'] for info in files.values())) as bar:
            for (_, info), line in zip(checked, threads.map(lambda item: _damage(*item), checked)):
                bad += [line] if line else []
                bar.update(info['bytes'])
        print(f'{path.parent}: {made} in {len(files):,} files: {f"{len(bad)} damaged" if bad else "whole"}')
        damage += bad
    return damage


def _damage(file: Path, info: dict[str, Any]) -> Optional[str]:
    try:
        size = file.stat().st_size
        if size != info['bytes']:
            return f'{file}: {size:,} bytes, should be {info["bytes"]:,}'
        return None if file_info(file) == info else f'{file}: its contents were changed ({HASH})'
    except OSError as error:
        return f'{file}: {"missing" if isinstance(error, FileNotFoundError) else error.strerror}'

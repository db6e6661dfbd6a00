"""Finishes a split, by an index over its parts and a manifest of its files, and checks a copy against the manifest."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, Optional

from src.common.errors import UserError
from src.common.progress import progress
from src.common.workers import map_in_threads
from src.conversion.output import Output, open_output, read_if_exists, remove_leftovers, unfinished_folder
from src.conversion.parts import HASH, PART, Job, Part, file_info, finished_parts
from src.conversion.sources import Source

INDEX, MANIFEST, TRAINED = 'index.json', 'manifest.json', 'trained.json'  # TRAINED is a tokenizer's manifest


def merge(split: str, jobs: list[Job], source: Source) -> dict[str, Any]:
    """Writes the index over all parts, then the manifest, and returns the manifest.

    Raises UserError if parts are missing, or no part holds a document.
    """
    output, finished = open_output(jobs[0].root), finished_parts(jobs)
    missing = [job.name for job, part in zip(jobs, finished, strict=True) if part is None]
    if missing:
        shown = ', '.join(missing[:10]) + (', ...' if len(missing) > 10 else '')
        raise UserError(f'--merge: {output}: {len(missing)} of {len(jobs)} parts are missing: {shown}; run their '
                        '--partition, or the same command without --merge')
    parts = {job.name: part for job, part in zip(jobs, finished, strict=True) if part is not None}
    full = {name: part for name, part in parts.items() if part['documents']}
    if not full:
        raise UserError(f'--source: there are no documents for {split}')
    shards = list(chain.from_iterable(map_in_threads(lambda name: _read_shards(output, name), list(full))))
    with unfinished_folder(output, INDEX) as folder:
        (folder / INDEX).write_text(json.dumps({'version': 2, 'shards': shards}), 'utf-8')
        files = {INDEX: file_info(folder / INDEX)}
        files |= {f'{name}/{file}': info for name, part in full.items() for file, info in part['files'].items()}
        options = jobs[0].options
        manifest = {'version': 1, 'source': source.name, 'revision': source.revision, 'split': split,
                    'options': {'max_docs': jobs[0].max_docs, **options.identity},
                    'tokenizer_name': options.tokenizer_name, **_sum_counts(list(parts.values())), 'files': files}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), 'utf-8')
        output.send(folder, [INDEX, MANIFEST])
    remove_leftovers(output, any_owner=True)
    return manifest


def _sum_counts(parts: list[Part]) -> dict[str, Any]:
    """Adds up the counts of all parts, and their hashes of the texts, which do not depend on the order of the texts."""
    counted = [key for key in ('documents', 'text_bytes', 'bad_documents', 'tokens') if key in parts[0]]
    texts_hash = sum(int(part['texts_hash'], 16) for part in parts) % 2**128
    return {key: sum(part[key] for part in parts) for key in counted} | {'texts_hash': f'{texts_hash:032x}'}


def _read_shards(output: Output, part: str) -> list[dict[str, Any]]:
    """Reads a part's index, and makes its paths relative to the split, as streaming's `merge_index` does."""
    try:
        shards = json.loads(output.read(f'{part}/{INDEX}'))['shards']
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        raise UserError(f'--out_root: {output}/{part}/{INDEX} is missing or damaged; delete {output}/{part}, then run '
                        'the same command again: it makes this part again') from None
    for file in (shard[key] for shard in shards for key in ('raw_data', 'zip_data') if shard[key]):
        file['basename'] = f'{part}/{file["basename"]}'
    return shards


def check_no_foreign_files(root: str, n_parts: int) -> None:
    """Raises UserError if the folder of a split holds files that are not of this conversion, and names one."""
    output, folder = open_output(root), Path(root)
    if output.remote:
        names = sorted({name.partition('/')[0] for name in output.list_names() or ()})
    else:
        names = sorted(path.name for path in folder.iterdir() if path.name[0] != '.') if folder.is_dir() else []
    parts = _part_names(names)
    foreign = sorted({*names} - {INDEX, MANIFEST, *parts})
    lone_index = INDEX in names and not parts and MANIFEST not in names
    if foreign or lone_index or output.remote and _is_foreign_index(read_if_exists(output, INDEX)):
        raise UserError(f'--out_root: {root} holds {(foreign or names or [INDEX])[0]}, which this program did not '
                        f'write; nothing was changed. Name another --out_root, delete {root}, or leave the split out '
                        'of --splits')
    if f'{n_parts:05}' in parts or output.remote and not names and read_if_exists(output, f'{n_parts:05}/{PART}'):
        raise UserError(f'--out_root: {root} holds the part {n_parts:05}, but the source has only {n_parts} files for '
                        'this split: the parts were made from another source; use that source, name another '
                        f'--out_root, or delete {root}')


def _part_names(names: list[str]) -> list[str]:
    return [name for name in names if name.isdecimal() and len(name) >= 5]


def _is_foreign_index(index: Optional[bytes]) -> bool:
    """Whether an index lists shards that lie outside of a part's subfolder, or cannot be read."""
    try:
        shards = json.loads(index)['shards'] if index else []
        return any('/' not in (shard['zip_data'] or shard['raw_data'])['basename'] for shard in shards)
    except (ValueError, KeyError, TypeError):
        return True


def verify(root: str) -> list[str]:
    """Checks each split in a folder, or one split, against its manifest; also a tokenizer that was trained with them.

    Returns a line for each file that is missing, cut short or changed, and for each split that is not finished. Raises
    UserError if there is no manifest, or the manifest is damaged.
    """
    manifests = sorted(Path(root).glob(f'*/{MANIFEST}')) or sorted(Path(root).glob(MANIFEST))
    if not manifests:
        raise UserError(f'--verify: {root} holds no SPLIT/{MANIFEST}, so this program did not finish a split there. '
                        'Name a folder on this machine; to make or finish its splits, use --out_root')
    damage = [f'{folder}: has no {MANIFEST}, so it was not finished' for folder in sorted(Path(root).iterdir())
              if folder.is_dir() and not (folder / MANIFEST).exists() and _part_names(os.listdir(folder))]
    for path in [*manifests, *Path(root).glob(f'tokenizer/{TRAINED}')]:
        try:
            manifest = json.loads(path.read_text('utf-8'))
            files = {path.parent / name: {key: info[key] for key in ('bytes', HASH)}
                     for name, info in manifest['files'].items()}
            contents = 'tokenizer' if path.name == TRAINED else f'{manifest["documents"]:,} documents'
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f'--verify: {path} is damaged ({error}); run the command that made the split again: it '
                            'writes this file again') from error
        bad, size = [], sum(info['bytes'] for info in files.values())
        with ThreadPoolExecutor(4) as threads, progress(str(path.parent), size) as bar:
            for info, line in zip(files.values(), threads.map(_find_damage, files, files.values())):
                bad += [line] if line else []
                bar.update(info['bytes'])
        print(f'{path.parent}: {contents} in {len(files):,} files: {f"{len(bad)} damaged" if bad else "whole"}')
        damage += bad
    return damage


def _find_damage(file: Path, info: dict[str, Any]) -> Optional[str]:
    """Describes how a file differs from its manifest; None where it does not."""
    try:
        size = file.stat().st_size
        if size != info['bytes']:
            return f'{file}: {size:,} bytes, should be {info["bytes"]:,}'
        return None if file_info(file) == info else f'{file}: its contents have changed ({HASH})'
    except OSError as error:
        return f'{file}: {"missing" if isinstance(error, FileNotFoundError) else error.strerror}'

"""Where a dataset lies: checked before it is opened, and what streaming raises in the words of the settings."""

import os
from pathlib import Path
from typing import Any, Optional

from src.errors import UserError


def is_url(remote: Optional[str]) -> bool:
    """Whether shards come from an object store or a server, which only streaming can look into."""
    return remote is not None and '://' in remote


def is_copied(remote: Optional[str], local: str) -> bool:
    """Whether the two are different places, so that shards are copied."""
    return remote is not None and (is_url(remote) or os.path.realpath(remote) != os.path.realpath(local))


def check_places(remote: Optional[str], local: Optional[str], split: str, cache_limit: Any) -> tuple[Optional[str], str]:
    """Where shards come from and where they are read.

    Returns:
        `remote`, None where the shards are in place and nothing is copied; and `local`.

    Raises:
        UserError: A folder, split or index that is missing, or a combination that would lose or mix up data.
    """
    if local is None:
        if remote is None or is_url(remote):
            raise UserError(f'dataset.local: missing; name a folder for the copies of the shards of {remote}')
        local = remote
    if not is_copied(remote, local):
        remote = None
    if cache_limit is not None and remote is None:
        raise UserError(f'dataset.cache_limit: {cache_limit!r} with no remote would delete the only copy of the data; '
                        'remove cache_limit, or set data_remote to where the data lies')
    if not is_url(remote):
        _check_folder(remote or local, split)
    if remote is not None and not is_url(remote):
        index, copy = Path(remote, split, 'index.json'), Path(local, split, 'index.json')
        if copy.is_file() and copy.read_bytes() != index.read_bytes():
            raise UserError(f'dataset.local: {copy.parent} holds shards of other data than {index.parent}; '
                            'remove it, or choose another data_local')
    return remote, local


def _check_folder(root: str, split: str) -> None:
    folder = Path(root, split)
    if (folder / 'index.json').is_file():
        return
    if not Path(root).is_dir():
        wrong = f'no folder {root!r}'
    elif not folder.is_dir():
        splits = sorted(index.parent.name for index in Path(root).glob('*/index.json'))
        wrong = f'{root!r} has no split {split!r}; it has: {", ".join(splits) or "none"}'
    else:
        wrong = f"{str(folder)!r} has no index.json, so it is no MDS dataset, or its conversion did not end"
    raise UserError(f'dataset: {wrong}. {_how_to_make(root, split)}')


def _how_to_make(root: str, split: str) -> str:
    return (f'Make it with\n  python convert_c4.py --out_root {root} --splits {split or "train val"} --source sample\n'
            'or from another --source: see python convert_c4.py --help')


def explain(e: Exception, remote: Optional[str], local: str, split: str) -> str:
    """What streaming raised, in the words of the settings."""
    text, where = str(e), os.path.join(remote or local, split)
    if 'Reused local directory' in text:
        return (f'dataset.local: {os.path.join(local, split)} is where another dataset that is still open copies its shards, '
                'in this process or another; give each run its own data_local')
    if 'cache limit' in text.lower():
        return f'dataset.cache_limit: {text}'
    if 'contains no samples' in text:
        return f'dataset: {where!r} holds no documents. {_how_to_make(remote or local, split)}'
    if 'empty or corrupted' in text:
        return f'dataset: {text}. {_how_to_make(remote or local, split)}'
    if is_url(remote):
        return (f'dataset.remote: cannot read {where}: {type(e).__name__}: {text.strip()}\n'
                'Check the address, the network and the credentials')
    return f'dataset: {where!r} cannot be opened: {type(e).__name__}: {text}'

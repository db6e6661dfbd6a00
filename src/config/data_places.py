"""The folders and addresses of a dataset: checks before it is opened, and explanations of streaming's errors."""

import json
import os
import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Optional

from src.common.errors import UserError
from src.config.schema import DatasetConfig, StreamConfig


def is_url(remote: Optional[str]) -> bool:
    """Whether shards come from an object store or a server (s3://, dbfs:/, ...) and not from a folder."""
    return remote is not None and re.match(r'[a-z][a-z0-9+.-]*:/', remote) is not None


def is_copied(remote: Optional[str], local: str, split: Optional[str]) -> bool:
    """Whether shards are copied: the split's folder in `remote` is another one than in `local`, links resolved."""
    if remote is None or is_url(remote):
        return remote is not None
    source, copy = (os.path.realpath(os.path.join(root, split or '')) for root in (remote, local))
    return source != copy and not (os.path.exists(source) and os.path.exists(copy) and os.path.samefile(source, copy))


def streams_of(data: DatasetConfig) -> dict[str, StreamConfig]:
    """The streams of a dataset by their dotted key. A stream without a split has the dataset's."""
    if data.streams:
        return {f'dataset.streams.{name}': stream.model_copy(update={'split': stream.split or data.split})
                for name, stream in data.streams.items()}
    return {'dataset': StreamConfig(remote=data.remote, local=data.local, split=data.split)} if data.local else {}


def read_columns(place: str) -> Optional[list[str]]:
    """The columns of the split in a folder or at a URL, read from the first shard in its index.

    None where the index cannot be read; the loader that opens the data then reports the cause.
    """
    text = _fetched_index(place) if is_url(place) else None
    try:
        text = text or Path(place, 'index.json').read_text(encoding='utf-8')
        return json.loads(text)['shards'][0]['column_names']
    except (OSError, ValueError, LookupError, TypeError):
        return None


@cache  # the index of a large dataset has megabytes
def _fetched_index(place: str) -> Optional[str]:
    from streaming.base.storage.download import CloudDownloader  # here: it takes seconds to import

    with TemporaryDirectory() as folder:
        try:
            CloudDownloader.direct_download(f'{place}/index.json', f'{folder}/index.json')
        except Exception:  # each object store has its own error classes
            return None
        return Path(folder, 'index.json').read_text(encoding='utf-8')


def stream_errors(data: DatasetConfig) -> list[str]:
    """One line for each mistake in the folders of a dataset; the caller puts the name of the loader in front."""
    out, copies, streams = [], {}, streams_of(data)
    if not streams:
        out.append('dataset.local: missing; set the folder of the shards or of their copies, or set streams')
    for key in ('remote', 'local') if data.streams else ():
        if getattr(data, key) is not None:
            out.append(f'dataset.{key}: {getattr(data, key)!r} does not go with streams, which have their own {key}; '
                       f'remove streams, or remove {key} (on the command line set it to null)')
    for name, stream in streams.items() if data.streams else ():
        place = os.path.realpath(os.path.join(stream.local, stream.split or ''))
        if place in copies:
            out.append(f'{name}.local: {stream.local!r} with split {stream.split!r} is also the folder of '
                       f'{copies[place]}; give each stream its own folder')
        copies[place] = name
    if data.cache_limit is not None and not all(is_copied(s.remote, s.local, s.split) for s in streams.values()):
        out.append(_only_copy_error(data.cache_limit))
    return out + _weight_errors(data)


def _weight_errors(data: DatasetConfig) -> list[str]:
    """Mistakes in `proportion`, `repeat` and `choose`: one of them for each stream, `proportion` for all or none."""
    weights = {name: [key for key in ('proportion', 'repeat', 'choose') if getattr(stream, key) is not None]
               for name, stream in (data.streams or {}).items()}
    out = [f'dataset.streams.{name}: {" and ".join(keys)} are set together; set only one of them'
           for name, keys in weights.items() if len(keys) > 1]
    kinds = {key for keys in weights.values() for key in keys}
    if 'proportion' in kinds and (missing := [name for name, keys in weights.items() if keys != ['proportion']]):
        out.append(f'dataset.streams.{missing[0]}.proportion: missing; if one stream has a proportion, every stream '
                   'needs one, and no stream may have repeat or choose')
    elif kinds & {'repeat', 'choose'} and data.epoch_size is not None:
        out.append(f'dataset.epoch_size: {data.epoch_size!r} does not go with repeat or choose of a stream, which '
                   'already set the size of an epoch; remove epoch_size, or set proportion for each stream')
    return out


def check_places(remote: Optional[str], local: Optional[str], split: str, cache_limit: Any,
                 setting: str = 'dataset') -> tuple[Optional[str], str]:
    """Checks where shards come from and where they are read. Returns `remote` and `local`.

    The `remote` that it returns is None where nothing is copied. Raises UserError if a folder, split or index is
    missing, or where the combination would lose or mix up data.
    """
    if local is None:
        if remote is None or is_url(remote):
            raise UserError(f'{setting}.local: missing; set a folder for the copies of the shards of {remote}')
        local = remote
    if not is_copied(remote, local, split):
        remote = None
    if cache_limit is not None and remote is None:
        raise UserError(_only_copy_error(cache_limit))
    if not is_url(remote):
        _check_folder(remote or local, split, setting)
    if remote is not None and not is_url(remote):
        index, copy = Path(remote, split, 'index.json'), Path(local, split, 'index.json')
        if copy.is_file() and copy.read_bytes() != index.read_bytes():
            raise UserError(f'{setting}.local: {copy.parent} holds shards of other data than {index.parent}; '
                            'remove that folder, or set another data_local')
        _check_separate(remote, local, split, setting)
    return remote, local


def _check_separate(remote: str, local: str, split: str, setting: str) -> None:
    """Refuses a folder for copies that overlaps with the original data, because a run deletes copies."""
    copy, root = Path(os.path.realpath(os.path.join(local, split))), os.path.realpath(remote)
    inside = next((p for p in copy.parents if Path(root) in p.parents and (p / 'index.json').is_file()), None)
    entries = os.scandir(copy) if copy.is_dir() else ()
    links = [entry.name for entry in entries if entry.is_symlink() and entry.is_dir()]
    linked = next((copy / name for name in links if not is_copied(remote, local, os.path.join(split, name))), None)
    if inside or linked:
        overlap = f'{copy} lies in {inside}, a split' if inside else f'{linked} is a link to a folder'
        raise UserError(f'{setting}.local: {overlap} of the remote {remote}. A run deletes copies, so it could delete '
                        'the original data; set data_local to a separate folder, or to data_remote (copies nothing)')


def _only_copy_error(cache_limit: Any) -> str:
    """The message that refuses `cache_limit` where nothing is copied."""
    return (f'dataset.cache_limit: {cache_limit!r} with no remote would delete the only copy of the data; remove '
            'cache_limit, or set data_remote to the folder or address of the data, and data_local to another folder')


def _check_folder(root: str, split: str, setting: str) -> None:
    folder = Path(root, split)
    if os.path.isfile(folder / 'index.json'):
        return
    if not os.path.isdir(root):
        problem = f'no folder {root!r}'
    elif not os.path.isdir(folder):
        splits = sorted(index.parent.name for index in Path(root).glob('*/index.json'))
        problem = f'{root!r} has no split {split!r}; it has: {", ".join(splits) or "none"}'
        if split == 'train' and 'val' in splits:
            problem += ('. To try the kit or to measure its speed, val is enough: set train_loader.dataset.split=val '
                        'allow_same_split=true')
    else:
        problem = f'{str(folder)!r} has no index.json, so it is not an MDS dataset, or its conversion did not finish'
    raise UserError(f'{setting}: {problem}. {conversion_command(root, split)}')


def conversion_command(root: str, split: str) -> str:
    """The sentence that names the command that makes the data."""
    return (f'Make it with\n  python convert_c4.py --out_root {root} --splits {split or "train val"} --source sample\n'
            'or from another --source: see python convert_c4.py --help')


def explain_streaming_error(e: Exception, remote: Optional[str], local: str, split: str,
                            setting: str = 'dataset') -> str:
    """Turns an error of streaming into a message that names the setting and what to do."""
    text, where = str(e), os.path.join(remote or local, split)
    if 'Reused local directory' in text:
        return (f'{setting}.local: {os.path.join(local, split)} is where another dataset that is still open copies its '
                'shards, in this process or another; set another data_local for each run')
    if 'cache limit' in text.lower():
        return f'dataset.cache_limit: {text}'
    if 'contains no samples' in text:
        return f'{setting}: {where!r} holds no documents. {conversion_command(remote or local, split)}'
    if 'empty or corrupted' in text:
        fix = (f'Remove {os.path.join(local, split)}; the next run copies it again' if remote
               else conversion_command(local, split))
        return f'{setting}: {text}. {fix}'
    if is_url(remote):
        return (f'{setting}.remote: cannot read {where}: {type(e).__name__}: {text.strip()}\n'
                'Check the address, the network and the credentials')
    return f'{setting}: {where!r} cannot be opened: {type(e).__name__}: {text}'


def is_missing(error: Exception, or_forbidden: bool = False) -> bool:
    """Whether the error of an object store means that the object does not exist. Each store has its own error classes.

    With `or_forbidden`, an object that may not be read counts as missing too: S3 answers 403 for a missing object if
    the user may not list the bucket.
    """
    missing = ('404', 'NoSuchKey', 404, *('403', 'AccessDenied', 403) * or_forbidden)
    response: Any = getattr(error, 'response', None)
    code = (response.get('Error', {}).get('Code') if isinstance(response, dict) else
            getattr(response, 'status_code', None))
    codes = [code, *(getattr(error, name, None) for name in ('code', 'status', 'status_code'))]
    return isinstance(error, FileNotFoundError) or any(code in missing for code in codes)

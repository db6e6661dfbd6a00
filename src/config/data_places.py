"""Where a dataset lies: checked before it is opened, and what streaming raises in the words of the settings."""

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
    """Whether shards come from an object store or a server (s3://, dbfs:/, ...), which only streaming can look into."""
    return remote is not None and re.match(r'[a-z][a-z0-9+.-]*:/', remote) is not None


def is_copied(remote: Optional[str], local: str, split: Optional[str]) -> bool:
    """Whether the split is a different place in the two, so that shards are copied. Links can make it one."""
    if remote is None or is_url(remote):
        return remote is not None
    one, other = (os.path.realpath(os.path.join(root, split or '')) for root in (remote, local))
    return one != other and not (os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other))


def streams_of(data: DatasetConfig) -> dict[str, StreamConfig]:
    """The streams of a dataset by the setting that names each; the dataset's split is that of a stream without one."""
    if data.streams:
        return {f'dataset.streams.{name}': stream.model_copy(update={'split': stream.split or data.split})
                for name, stream in data.streams.items()}
    return {'dataset': StreamConfig(remote=data.remote, local=data.local, split=data.split)} if data.local else {}


def columns_of(place: str) -> Optional[list[str]]:
    """The columns of the split in a folder or at a URL, as the first shard in its index has them.

    None where no index can be read: whoever opens the data then says what is wrong.
    """
    text = _fetched_index(place) if is_url(place) else None
    try:
        text = text or Path(place, 'index.json').read_text(encoding='utf-8')
        return json.loads(text)['shards'][0]['column_names']
    except (OSError, ValueError, LookupError, TypeError):
        return None


@cache  # a large index has megabytes
def _fetched_index(place: str) -> Optional[str]:
    from streaming.base.storage.download import CloudDownloader  # here: it takes seconds to import

    with TemporaryDirectory() as folder:
        try:
            CloudDownloader.direct_download(f'{place}/index.json', f'{folder}/index.json')
        except Exception:  # each object store has error classes of its own
            return None
        return Path(folder, 'index.json').read_text(encoding='utf-8')


def stream_errors(data: DatasetConfig) -> list[str]:
    """What is wrong with the places of a dataset; the name of its loader comes before each line."""
    out, copies, streams = [], {}, streams_of(data)
    if not streams:
        out.append('dataset.local: missing; name the folder of the shards or of their copies, or set streams')
    for key in ('remote', 'local') if data.streams else ():
        if getattr(data, key) is not None:
            out.append(f'dataset.{key}: {getattr(data, key)!r} together with streams, which name their own; remove one '
                       f'of them (on the command line: dataset.{key}=null)')
    for name, stream in streams.items() if data.streams else ():
        place = os.path.realpath(os.path.join(stream.local, stream.split or ''))
        if place in copies:
            out.append(f'{name}.local: {stream.local!r} with split {stream.split!r} is also the place of '
                       f'{copies[place]}; give each stream its own')
        copies[place] = name
    if data.cache_limit is not None and not all(is_copied(s.remote, s.local, s.split) for s in streams.values()):
        out.append(only_copy(data.cache_limit))
    return out + _weight_errors(data)


def _weight_errors(data: DatasetConfig) -> list[str]:
    """How much is read of each stream: one of three ways, and the first of them for all streams or for none."""
    weights = {name: [key for key in ('proportion', 'repeat', 'choose') if getattr(stream, key) is not None]
               for name, stream in (data.streams or {}).items()}
    out = [f'dataset.streams.{name}: {" and ".join(keys)} are two ways to say one thing; set one of them'
           for name, keys in weights.items() if len(keys) > 1]
    kinds = {key for keys in weights.values() for key in keys}
    if 'proportion' in kinds and (missing := [name for name, keys in weights.items() if keys != ['proportion']]):
        out.append(f'dataset.streams.{missing[0]}.proportion: missing; where one stream has a proportion, each must '
                   'have one, and none repeat or choose')
    elif kinds & {'repeat', 'choose'} and data.epoch_size is not None:
        out.append(f'dataset.epoch_size: {data.epoch_size!r} together with repeat or choose of streams, which say how '
                   'many samples an epoch has; remove it, or set proportion for each stream')
    return out


def check_places(remote: Optional[str], local: Optional[str], split: str, cache_limit: Any,
                 setting: str = 'dataset') -> tuple[Optional[str], str]:
    """Where shards come from and where they are read.

    Returns `remote`, None where the shards are in place and nothing is copied; and `local`. Raises UserError where a
    folder, split or index is missing, or a combination would lose or mix up data.
    """
    if local is None:
        if remote is None or is_url(remote):
            raise UserError(f'{setting}.local: missing; name a folder for the copies of the shards of {remote}')
        local = remote
    if not is_copied(remote, local, split):
        remote = None
    if cache_limit is not None and remote is None:
        raise UserError(only_copy(cache_limit))
    if not is_url(remote):
        _check_folder(remote or local, split, setting)
    if remote is not None and not is_url(remote):
        index, copy = Path(remote, split, 'index.json'), Path(local, split, 'index.json')
        if copy.is_file() and copy.read_bytes() != index.read_bytes():
            raise UserError(f'{setting}.local: {copy.parent} holds shards of other data than {index.parent}; '
                            'remove it, or choose another data_local')
        _check_apart(remote, local, split, setting)
    return remote, local


def _check_apart(remote: str, local: str, split: str, setting: str) -> None:
    """Refuses a place for copies that is, in part, the place of the originals: a run removes copies."""
    copy, root = Path(os.path.realpath(os.path.join(local, split))), os.path.realpath(remote)
    inside = next((p for p in copy.parents if Path(root) in p.parents and (p / 'index.json').is_file()), None)
    entries = os.scandir(copy) if copy.is_dir() else ()
    links = [entry.name for entry in entries if entry.is_symlink() and entry.is_dir()]
    linked = next((copy / name for name in links if not is_copied(remote, local, os.path.join(split, name))), None)
    if inside or linked:
        wrong = f'{copy} lies in {inside}, a split' if inside else f'{linked} is a link to a folder'
        raise UserError(f'{setting}.local: {wrong} of the remote {remote}, and the run removes copies; set data_local '
                        'to a folder of its own, or to the same as data_remote: then nothing is copied')


def only_copy(cache_limit: Any) -> str:
    """Why there is no `cache_limit` where nothing is copied."""
    return (f'dataset.cache_limit: {cache_limit!r} with no remote would delete the only copy of the data; remove '
            'cache_limit, or set data_remote to where the data lies')


def _check_folder(root: str, split: str, setting: str) -> None:
    folder = Path(root, split)
    if os.path.isfile(folder / 'index.json'):
        return
    if not os.path.isdir(root):
        wrong = f'no folder {root!r}'
    elif not os.path.isdir(folder):
        splits = sorted(index.parent.name for index in Path(root).glob('*/index.json'))
        wrong = f'{root!r} has no split {split!r}; it has: {", ".join(splits) or "none"}'
        if split == 'train' and 'val' in splits:
            wrong += ('. To try the kit or to measure its speed, val is enough: set train_loader.dataset.split=val '
                      'allow_same_split=true')
    else:
        wrong = f"{str(folder)!r} has no index.json, so it is no MDS dataset, or its conversion did not end"
    raise UserError(f'{setting}: {wrong}. {conversion_command(root, split)}')


def conversion_command(root: str, split: str) -> str:
    """The command that makes the data."""
    return (f'Make it with\n  python convert_c4.py --out_root {root} --splits {split or "train val"} --source sample\n'
            'or from another --source: see python convert_c4.py --help')


def explain_streaming_error(e: Exception, remote: Optional[str], local: str, split: str,
                            setting: str = 'dataset') -> str:
    """What streaming raised, in the words of the settings."""
    text, where = str(e), os.path.join(remote or local, split)
    if 'Reused local directory' in text:
        return (f'{setting}.local: {os.path.join(local, split)} is where another dataset that is still open copies its '
                'shards, in this process or another; give each run its own data_local')
    if 'cache limit' in text.lower():
        return f'dataset.cache_limit: {text}'
    if 'contains no samples' in text:
        return f'{setting}: {where!r} holds no documents. {conversion_command(remote or local, split)}'
    if 'empty or corrupted' in text:
        copied = f'Remove {os.path.join(local, split)}: it is copied again'
        mend = copied if remote else conversion_command(local, split)
        return f'{setting}: {text}. {mend}'
    if is_url(remote):
        return (f'{setting}.remote: cannot read {where}: {type(e).__name__}: {text.strip()}\n'
                'Check the address, the network and the credentials')
    return f'{setting}: {where!r} cannot be opened: {type(e).__name__}: {text}'


def is_missing(error: Exception, or_forbidden: bool = False) -> bool:
    """Whether a store says that there is no such object; each has error classes of its own.

    With `or_forbidden` an object that may not be read counts too. S3 says 403 of one that is missing to whoever may not
    list the bucket.
    """
    says = ('404', 'NoSuchKey', 404, *('403', 'AccessDenied', 403) * or_forbidden)
    response: Any = getattr(error, 'response', None)
    code = (response.get('Error', {}).get('Code') if isinstance(response, dict) else
            getattr(response, 'status_code', None))
    codes = [code, *(getattr(error, name, None) for name in ('code', 'status', 'status_code'))]
    return isinstance(error, FileNotFoundError) or any(code in says for code in codes)

"""Fetches the files of a dataset under a temporary name, checks them, and fetches a damaged one again."""

import json
import os
import shutil
import time
from collections.abc import Container
from contextlib import suppress
from pathlib import Path
from random import SystemRandom
from typing import Any, Optional

from streaming.base.format import FileInfo
from streaming.base.hashing import get_hash

from src.common.errors import DISK_FULL, UserError, exception_chain, first_line
from src.common.machine import find_unwritable_folder
from src.common.storage import is_leftover
from src.config.data_places import is_url

BACKOFF_S = 1.0  # seconds before the second attempt at a file; doubles with each further attempt
PART = '.part'  # ending of a file that has not been checked yet


class DamagedFileError(Exception):
    """A file differs from what the index says."""


def check_file(path: str, info: Optional[FileInfo], algorithm: Optional[str] = None) -> None:
    """Raises DamagedFileError, with the reason, where a file is missing or differs from `info`, its entry in the index.

    Without `info` the file is an index itself, and must be JSON. `algorithm` names the hash of the entry that is
    checked; None: only the size is checked.
    """
    if not os.path.exists(path):
        raise DamagedFileError('it is missing')
    if info is None:
        try:
            json.loads(Path(path).read_bytes())
        except ValueError:
            raise DamagedFileError('it is not complete JSON') from None
        return
    size = os.path.getsize(path)
    if size != info.bytes:
        raise DamagedFileError(f'it has {size:,} bytes, but the index says {info.bytes:,}')
    if algorithm and (found := get_hash(algorithm, Path(path).read_bytes())) != info.hashes[algorithm]:
        raise DamagedFileError(f'its {algorithm} is {found}, but the index says {info.hashes[algorithm]}')


def is_full_disk(e: Optional[BaseException]) -> bool:
    """Whether a full disk is the cause of an error."""
    return any(isinstance(cause, OSError) and cause.errno in DISK_FULL for cause in exception_chain(e))


def describe_error(e: Exception) -> str:
    """Says in a few words why a file could not be fetched."""
    if isinstance(e, DamagedFileError):
        return str(e)
    return 'it is missing' if isinstance(e, FileNotFoundError) else f'{type(e).__name__}: {first_line(e)}'


def fetch(stream: Any, name: str, path: str, info: Optional[FileInfo], algorithm: Optional[str]) -> None:
    """Fetches a file of a stream under a temporary name, checks it and renames it, in `1 + download_retry` attempts.

    `stream` is a CheckedStream, `name` the file's name in its remote, and `path` the place of the copy. `info` and
    `algorithm` are those of `check_file`. Raises UserError if no attempt gives a file that passes the check.
    """
    part, error = path + PART, Exception()
    for attempt in range(1 + stream.download_retry):
        if attempt:
            stream.warn_of_retry(name, describe_error(error), attempt)
            time.sleep(BACKOFF_S * 2 ** (attempt - 1) * SystemRandom().uniform(1, 1.5))
        Path(part).unlink(missing_ok=True)  # streaming does not download to a path that exists
        try:
            stream._downloader.download(os.path.join(stream.place, name), part, stream.download_timeout)
            check_file(part, info, algorithm)
            os.replace(part, path)
            return
        except Exception as e:  # each object store has error classes of its own
            error = e
            stream._downloader.clean_up()
            if find_unwritable_folder(os.path.dirname(path)):
                break
        for leftover in Path(path).parent.glob(os.path.basename(part) + '*'):
            leftover.unlink(missing_ok=True)
    raise UserError(_explain_failure(stream, name, os.path.dirname(path), info, error))


def remove_parts(folder: Path, names: Container[str], any_owner: bool) -> None:
    """Removes partly fetched files that killed runs have left in `folder`, the folder of a split.

    `names` are the names of the split's files. With `any_owner` the partial files of other machines and of running runs
    are removed too; those runs fetch the files again.
    """
    for part in folder.rglob(f'*{PART}*'):
        if str(part.relative_to(folder)).split(PART)[0] in names and (any_owner or is_leftover(part.name)):
            with suppress(OSError):  # the file may belong to another user
                part.unlink()


def _explain_failure(stream: Any, name: str, folder: str, info: Optional[FileInfo], error: Exception) -> str:
    if wrong := find_unwritable_folder(folder):
        return (f'{stream.setting}.local: {name} of {stream.place} cannot be copied to {stream.local}: {wrong} cannot '
                'be written. Set data_local to a folder on a disk of this machine')
    if is_full_disk(error):
        free = shutil.disk_usage(folder).free
        size = f' ({info.bytes:,} bytes)' if info else ''
        return (f'{stream.setting}.local: the disk of {folder} is full ({free:,} bytes free): no space for {name} of '
                f'{stream.place}{size}; make room, set cache_limit, or choose a data_local on another disk')
    access = 'the address, the network and the credentials, and ' if is_url(stream.remote) else ''
    return (f'{stream.setting}.remote: {name} of {stream.place} could not be fetched in {1 + stream.download_retry} '
            f'attempts: {describe_error(error)}. Check {access}that the data there is complete')

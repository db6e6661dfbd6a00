"""Streaming's Stream with checks: a damaged shard is fetched again, and a failure ends in one clear message."""

import logging
import os
from pathlib import Path
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray
from streaming import Stream
from streaming.base.format import FileInfo, Reader
from streaming.base.hashing import is_hash
from streaming.base.world import World

from src.common.errors import UserError
from src.common.machine import find_unwritable_folder
from src.common.storage import owner_tag
from src.common.workers import map_in_threads
from src.config.data_places import check_places, conversion_command, explain_streaming_error
from src.loader.fetching import PART, DamagedFileError, check_file, describe_error, fetch, is_full_disk, remove_parts

log = logging.getLogger('src')


class CheckedStream(Stream):
    """A Stream that checks each shard against the index: its size and, if the index has hashes, its hash.

    It fetches a file under a temporary name, checks it and renames it. A file that is missing, truncated or damaged is
    fetched again, up to `download_retry` times. At the start it checks the sizes of all files in `local` and, with
    `validate_hash`, their hashes. A damaged copy is removed and fetched again; damaged data that is read in place is an
    error. Streaming 0.13.0 itself only looks whether a file exists.

    `setting` names the stream in messages, as in `dataset` or `dataset.streams.books`. `cache_limit` is that of the
    dataset. Stream defines the others. Raises UserError if the data is not there, or a shard cannot be fetched.
    """

    def __init__(self, setting: str, cache_limit: Any, remote: Optional[str], local: Optional[str],
                 split: Optional[str], **kwargs: Any) -> None:
        self.setting = setting
        remote, local = check_places(remote, local, split or '', cache_limit, setting)
        try:
            super().__init__(remote=remote, local=local, split=split, **kwargs)
        except Exception as e:  # each object store has error classes of its own
            raise UserError(explain_streaming_error(e, remote, local, split or '', setting)) from None
        self._infos: dict[str, FileInfo] = {}
        self._hash_at_start = self._hash_when_fetched = None

    @property
    def place(self) -> str:
        """The folder or URL of the original data."""
        return os.path.join(self.remote or self.local, self.split)

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """Reads the index, and chooses which kind of hash to check."""
        try:
            shards = super().get_shards(world, allow_unsafe_types)
        except UserError:
            raise
        except Exception as e:  # each object store has error classes of its own, and an index may hold anything
            raise UserError(explain_streaming_error(e, self.remote, self.local, self.split, self.setting)) from None
        self._infos = {info.basename: info for shard in shards for pair in shard.file_pairs for info in pair if info}
        # Streaming itself would hash a second time, and leave a damaged file where it is.
        self._hash_at_start, self.validate_hash = self.validate_hash, None
        kinds = set.intersection(*(set(info.hashes) for info in self._infos.values())) if self._infos else set()
        if self._hash_at_start and self._infos and self._hash_at_start not in kinds:
            raise UserError(f'{self.setting}.validate_hash: {self._hash_at_start!r}, but the index of {self.place} has '
                            f'hashes of {", ".join(sorted(kinds)) or "no kind"}; set one of those, or null')
        fastest_first = sorted(filter(is_hash, kinds), reverse=True)  # xxh before sha and md5
        self._hash_when_fetched = self._hash_at_start or next(iter(fastest_first), None)
        return shards

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: NDArray[np.int64]) -> None:
        """Checks the files in `local`, and counts their bytes.

        Streaming's own method looks at names alone, and would remove shards that lie in place without their zip file.
        """
        _check_unpacking(self, shards)
        folder = Path(self.local, self.split)
        if self.remote is not None or any(shard.compression for shard in shards):  # else nothing is written there
            remove_parts(folder, self._infos, any_owner=self.remote is not None)
        usage = map_in_threads(self._count_good_bytes, shards)
        cache_usage_per_shard[:] = usage
        if self.remote is not None or all(usage):
            return
        damaged = [shard.file_pairs[0][0] for shard, n_bytes in zip(shards, usage) if not n_bytes]
        try:
            check_file(os.path.join(folder, damaged[0].basename), damaged[0], self._hash_at_start)
        except DamagedFileError as e:
            raise UserError(f'{self.setting}: shard {damaged[0].basename} of {folder} is damaged: {e}. Damaged '
                            f'or missing: {len(damaged)} of {len(shards)} shards; copy them again. '
                            f'{conversion_command(self.local, self.split)}') from None

    def _count_good_bytes(self, shard: Reader) -> int:
        """Bytes of a shard's undamaged files, raw and zipped; 0 if there is none. Removes a copy that is damaged."""
        total = 0
        for info in (info for pair in shard.file_pairs for info in pair if info):
            path = os.path.join(self.local, self.split, info.basename)
            if not os.path.exists(path):
                continue
            try:
                check_file(path, info, self._hash_at_start)
                total += info.bytes
            except DamagedFileError:
                if self.remote is None:
                    return 0
                os.remove(path)
        return total

    def _download_file(self, from_basename: str, to_basename: Optional[str] = None) -> str:
        """Fetches a file and checks it; streaming's own method does not check."""
        path = os.path.join(self.local, self.split, to_basename or from_basename)
        if self.remote is None:
            raise UserError(f'{self.setting}: {from_basename} of {self.place} is missing. '
                            f'{conversion_command(self.local, self.split)}')
        info = self._infos.get(from_basename)
        fetch(self, from_basename, path, info, self._hash_when_fetched if info else None)
        return path

    def warn_of_retry(self, name: str, cause: str, attempt: int) -> None:
        """Logs that a file is fetched again, and why."""
        log.warning('%s of %s: %s; fetching it again (%d of %d)', name, self.place, cause, attempt, self.download_retry)

    def _decompress_shard_part(self, zip_info: FileInfo, zip_filename: str, raw_filename: str,
                               compression: Optional[str]) -> None:
        # The name is unique: another dataset or job may unpack the same shard in the same folder.
        unpacked, cause = f'{raw_filename}{PART}-{owner_tag()}', ''
        for attempt in range(1 + (self.download_retry if self.remote is not None else 0)):
            if attempt:  # the file was damaged on its way, and the index has no hash that would have shown it
                self.warn_of_retry(zip_info.basename, cause, attempt)
                Path(zip_filename).unlink(missing_ok=True)
                self._download_file(zip_info.basename)
            try:
                super()._decompress_shard_part(zip_info, zip_filename, unpacked, compression)
                return os.replace(unpacked, raw_filename)
            except Exception as e:  # each compression has error classes of its own
                Path(unpacked + '.tmp').unlink(missing_ok=True)
                cause = 'no space left to unpack it' if is_full_disk(e) else describe_error(e)
                if is_full_disk(e):
                    break
        raise UserError(f'{self.setting}.local: {zip_filename}, of {self.place}, cannot be unpacked: {cause}. Make '
                        'room on its disk, or repair the shard in its source')


def _check_unpacking(stream: CheckedStream, shards: list[Reader]) -> None:
    """Raises UserError if compressed shards are read in place and their folder cannot be written."""
    unpacked = (os.path.join(stream.local, stream.split, raw.basename)
                for shard in shards for raw, zipped in shard.file_pairs if zipped and stream.remote is None)
    missing = next((path for path in unpacked if not os.path.exists(path)), None)
    if missing and (wrong := find_unwritable_folder(os.path.dirname(missing))):
        raise UserError(f'{stream.setting}.local: {stream.place} holds compressed shards, which are unpacked where '
                        f'they lie, but {wrong} cannot be written. Set data_local to a folder on a disk of this '
                        f'machine, for unpacked copies, and data_remote to {stream.local}; or convert without '
                        '--compression')

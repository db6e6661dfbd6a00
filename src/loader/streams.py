"""Streaming's Stream, mended: every shard is checked, and one that cannot be had is one message."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
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
from src.config.data_places import check_places, conversion_command, explain_streaming_error
from src.loader.fetching import PART, DamagedFileError, check_file, describe_error, fetch, is_full_disk, remove_parts

log = logging.getLogger('src')


class CheckedStream(Stream):
    """A Stream whose shards are whole: of the size that the index says and, where it has hashes, of that hash.

    A file is fetched under another name, checked and renamed. One that is missing, truncated or damaged is fetched
    again up to `download_retry` times. What lies in `local` at the start is checked for its size and, with
    `validate_hash`, for its hash: of a copy, a file that is wrong is removed and fetched again; where nothing is copied
    it is an error. Streaming 0.13.0 itself takes a shard for whole once it is there.

    `setting` is how messages call it, as `dataset` or `dataset.streams.books`, and `cache_limit` is the dataset's; the
    others are as Stream has them. Raises UserError where there is no such place, or a shard cannot be had.
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
        self._hash = self._hash_fetched = None

    @property
    def place(self) -> str:
        """Where the data lies."""
        return os.path.join(self.remote or self.local, self.split)

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """Reads the index, and chooses the hashes that are checked."""
        try:
            shards = super().get_shards(world, allow_unsafe_types)
        except UserError:
            raise
        except Exception as e:  # as above; and an index may hold anything
            raise UserError(explain_streaming_error(e, self.remote, self.local, self.split, self.setting)) from None
        self._infos = {info.basename: info for shard in shards for pair in shard.file_pairs for info in pair if info}
        # Streaming itself would hash a second time, and leave the damaged file where it is read.
        self._hash, self.validate_hash = self.validate_hash, None
        known = set.intersection(*(set(info.hashes) for info in self._infos.values())) if self._infos else set()
        if self._hash and self._infos and self._hash not in known:
            raise UserError(f'{self.setting}.validate_hash: {self._hash!r}, but the index of {self.place} has hashes '
                            f'of {", ".join(sorted(known)) or "no kind"}; set one of those, or null')
        fastest_first = sorted(filter(is_hash, known), reverse=True)  # xxh before sha and md5
        self._hash_fetched = self._hash or next(iter(fastest_first), None)
        return shards

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: NDArray[np.int64]) -> None:
        """Checks what lies in `local`, and counts its bytes.

        Instead of streaming's, which goes by names alone, and in place removes shards without their zip form.
        """
        _check_unpacking(self, shards)
        folder = Path(self.local, self.split)
        if self.remote is not None or any(shard.compression for shard in shards):  # else nothing is written there
            remove_parts(folder, self._infos, of_all=self.remote is not None)
        with ThreadPoolExecutor() as pool:
            usage = list(pool.map(self._bytes_present, shards))
        cache_usage_per_shard[:] = usage
        if self.remote is not None or all(usage):
            return
        lacking = [shard.file_pairs[0][0] for shard, n in zip(shards, usage) if not n]
        try:
            check_file(os.path.join(folder, lacking[0].basename), lacking[0], self._hash)
        except DamagedFileError as e:
            raise UserError(f'{self.setting}: shard {lacking[0].basename} of {folder} is damaged: {e}. Of '
                            f'{len(shards)} shards {len(lacking)} are not whole: copy them again. '
                            f'{conversion_command(self.local, self.split)}') from None

    def _bytes_present(self, shard: Reader) -> int:
        """Bytes of a shard's files, raw and zipped; 0 where none is whole. A copy that is damaged is removed."""
        total = 0
        for info in (info for pair in shard.file_pairs for info in pair if info):
            path = os.path.join(self.local, self.split, info.basename)
            if not os.path.exists(path):
                continue
            try:
                check_file(path, info, self._hash)
                total += info.bytes
            except DamagedFileError:
                if self.remote is None:
                    return 0
                os.remove(path)
        return total

    def _download_file(self, from_basename: str, to_basename: Optional[str] = None) -> str:
        """Fetches a file; instead of streaming's, which does not look at what came."""
        path = os.path.join(self.local, self.split, to_basename or from_basename)
        if self.remote is None:
            raise UserError(f'{self.setting}: {from_basename} of {self.place} is missing. '
                            f'{conversion_command(self.local, self.split)}')
        info = self._infos.get(from_basename)
        fetch(self, from_basename, path, info, self._hash_fetched if info else None)
        return path

    def warn_of_another(self, name: str, what: str, attempt: int) -> None:
        """Says that a file is fetched again, and why."""
        log.warning('%s of %s: %s; fetching it again (%d of %d)', name, self.place, what, attempt, self.download_retry)

    def _decompress_shard_part(self, zip_info: FileInfo, zip_filename: str, raw_filename: str,
                               compression: Optional[str]) -> None:
        # Under a name of its own: another dataset or job may unpack the same shard in the same folder.
        unpacked, what = f'{raw_filename}{PART}-{owner_tag()}', ''
        for attempt in range(1 + (self.download_retry if self.remote is not None else 0)):
            if attempt:  # damaged on its way, in an index without hashes
                self.warn_of_another(zip_info.basename, what, attempt)
                Path(zip_filename).unlink(missing_ok=True)
                self._download_file(zip_info.basename)
            try:
                super()._decompress_shard_part(zip_info, zip_filename, unpacked, compression)
                return os.replace(unpacked, raw_filename)
            except Exception as e:  # each compression has error classes of its own
                Path(unpacked + '.tmp').unlink(missing_ok=True)
                what = 'no space left to unpack it' if is_full_disk(e) else describe_error(e)
                if is_full_disk(e):
                    break
        raise UserError(f'{self.setting}.local: {zip_filename}, of {self.place}, cannot be unpacked: {what}. Make room '
                        'on its disk, or mend the shard where it lies')


def _check_unpacking(stream: CheckedStream, shards: list[Reader]) -> None:
    """Refuses compressed shards that are read in place, from where they cannot be unpacked."""
    unpacked = (os.path.join(stream.local, stream.split, raw.basename)
                for shard in shards for raw, zipped in shard.file_pairs if zipped and stream.remote is None)
    missing = next((path for path in unpacked if not os.path.exists(path)), None)
    if missing and (wrong := find_unwritable_folder(os.path.dirname(missing))):
        raise UserError(f'{stream.setting}.local: {stream.place} holds compressed shards, which are unpacked where '
                        f'they lie, and {wrong} cannot be written. Set data_local to a folder on a disk of this '
                        f'machine, for unpacked copies, and data_remote to {stream.local}; or convert without '
                        '--compression')

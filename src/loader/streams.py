"""StreamingDataset and Stream, mended: every shard is checked, and what cannot be had ends the run in one message.

Streaming 0.13.0 takes a shard for whole once it is there, leaves a shard that failed in the state "being prepared", for which
other workers wait for ever, and raises in threads. What is overridden here says why.
"""

import json
import logging
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import SystemRandom
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray
from streaming import Stream, StreamingDataLoader, StreamingDataset
from streaming.base.constant import TICK
from streaming.base.dataset import _Iterator, _ShardState
from streaming.base.format import FileInfo, Reader
from streaming.base.hashing import get_hash, is_hash
from streaming.base.world import World
from torch.utils.data import DataLoader

from src.common.errors import DISK_FULL, UserError, first_line
from src.common.machine import explain_lost_worker, not_writable
from src.config.data_places import check_places, explain, how_to_make, is_url

BACKOFF_S = 1.0  # before the second attempt at a file; doubles from one to the next
PART = '.part'  # a file until it is known to be whole
RETRIES_UNDER_CACHE_LIMIT = 1000

log = logging.getLogger('src')


def _fault(path: str, info: Optional[FileInfo], algorithm: Optional[str] = None) -> Optional[str]:
    """What is wrong with a file; None: nothing. Without `info` it is an index, which must be JSON."""
    if info is None:
        try:
            json.loads(Path(path).read_bytes())
        except ValueError:
            return 'it is no whole JSON'
        return None
    try:
        size = os.path.getsize(path)
    except FileNotFoundError:
        return 'it is missing'
    if size != info.bytes:
        return f'it has {size:,} bytes, and the index says {info.bytes:,}'
    if algorithm and (found := get_hash(algorithm, Path(path).read_bytes())) != info.hashes[algorithm]:
        return f'its {algorithm} is {found}, and the index says {info.hashes[algorithm]}'
    return None


def _is_full_disk(e: Optional[BaseException]) -> bool:
    while e is not None and not (isinstance(e, OSError) and e.errno in DISK_FULL):
        e = e.__cause__ or e.__context__
    return e is not None


class CheckedStream(Stream):
    """A Stream whose shards are whole: of the size that the index says and, where it has hashes, of that hash.

    A file is fetched under another name, checked and renamed. One that is missing, truncated or damaged is fetched again up to
    `download_retry` times. What lies in `local` at the start is checked for its size and, with `validate_hash`, for its hash:
    of a copy, a file that is wrong is removed and fetched again; where nothing is copied it is an error.

    Args:
        setting: How messages call it, as `dataset` or `dataset.streams.books`.
        cache_limit: The dataset's.
        remote, local, split, **kwargs: As Stream has them.

    Raises:
        UserError: There is no such place, or a shard cannot be had.
    """

    def __init__(self, setting: str, cache_limit: Any, remote: Optional[str], local: Optional[str], split: Optional[str],
                 **kwargs: Any) -> None:
        self.setting = setting
        remote, local = check_places(remote, local, split or '', cache_limit, setting)
        try:
            super().__init__(remote=remote, local=local, split=split, **kwargs)
        except Exception as e:  # each object store has error classes of its own
            raise UserError(explain(e, remote, local, split or '', setting)) from None
        self._infos: dict[str, FileInfo] = {}

    @property
    def place(self) -> str:
        """Where the data lies."""
        return os.path.join(self.remote or self.local, self.split)

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        try:
            shards = super().get_shards(world, allow_unsafe_types)
        except UserError:
            raise
        except Exception as e:
            if not is_url(self.remote) and not isinstance(e, (OSError, ValueError, RuntimeError, KeyError)):
                raise
            raise UserError(explain(e, self.remote, self.local, self.split, self.setting)) from None
        self._infos = {info.basename: info for shard in shards for pair in shard.file_pairs for info in pair if info}
        # Streaming itself would hash a second time, and leave the damaged file where it is read.
        self._hash, self.validate_hash = self.validate_hash, None
        known = set.intersection(*(set(info.hashes) for info in self._infos.values())) if self._infos else set()
        if self._hash and self._infos and self._hash not in known:
            raise UserError(f'{self.setting}.validate_hash: {self._hash!r}, but the index of {self.place} has hashes of '
                            f'{", ".join(sorted(known)) or "no kind"}; set one of those, or null')
        self._hash_fetched = self._hash or next((name for name in sorted(known, reverse=True) if is_hash(name)),
                                                None)  # xxh before sha and md5: faster
        return shards

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: NDArray[np.int64]) -> None:
        """Checks what lies in `local`, and counts its bytes.

        Instead of streaming's, which goes by names alone, and where nothing is copied removes shards without their zip form.
        """
        folder = Path(self.local, self.split)
        if self.remote is None:
            self._check_unpacking(shards)
        if self.remote is not None or any(shard.compression for shard in shards):
            self._remove_parts(folder)
        with ThreadPoolExecutor() as pool:
            usage = list(pool.map(self._bytes_present, shards))
        cache_usage_per_shard[:] = usage
        if self.remote is None and not all(usage):
            lacking = [shard.file_pairs[0][0].basename for shard, n in zip(shards, usage) if not n]
            faults = [_fault(str(folder / name), self._infos[name], self._hash) for name in lacking]
            raise UserError(f'{self.setting}: shard {lacking[0]} of {folder} is damaged: {faults[0]}. Of {len(shards)} shards '
                            f'{len(lacking)} are not whole: copy them again. {how_to_make(self.local, self.split)}')

    def _remove_parts(self, folder: Path) -> None:
        """Removes parts of files that killed runs left. In a folder that is read in place others may be unpacking."""
        for part in folder.rglob(f'*{PART}*'):
            process = re.search(rf'{PART}-{re.escape(socket.gethostname())}-(\d+)-[0-9a-f]{{32}}(\.tmp)?$', part.name)
            is_left = self.remote is not None or (process and not os.path.exists(f'/proc/{process[1]}'))
            if is_left and str(part.relative_to(folder)).split(PART)[0] in self._infos:
                part.unlink(missing_ok=True)

    def _check_unpacking(self, shards: list[Reader]) -> None:
        """Refuses compressed shards that are read in place, from where they cannot be unpacked."""
        unpacked = (os.path.join(self.local, self.split, raw.basename)
                    for shard in shards for raw, zipped in shard.file_pairs if zipped)
        missing = next((path for path in unpacked if not os.path.exists(path)), None)
        if missing and (wrong := not_writable(os.path.dirname(missing))):
            raise UserError(f'{self.setting}.local: {self.place} holds compressed shards, which are unpacked where '
                            f'they lie, and {wrong} cannot be written. Set data_local to a folder on a disk of this '
                            f'machine, for unpacked copies, and data_remote to {self.local}; or convert without '
                            '--compression')

    def _bytes_present(self, shard: Reader) -> int:
        """Bytes of a shard's files, raw and zipped; 0 where none is whole. A copy that is damaged is removed."""
        total = 0
        for info in (info for pair in shard.file_pairs for info in pair if info):
            path = os.path.join(self.local, self.split, info.basename)
            if os.path.exists(path):
                if _fault(path, info, self._hash) is None:
                    total += info.bytes
                elif self.remote is None:
                    return 0
                else:
                    os.remove(path)
        return total

    def _download_file(self, from_basename: str, to_basename: Optional[str] = None) -> str:
        """Fetches a file; instead of streaming's, which does not look at what came.

        Raises:
            UserError: It could not be had, whole, in `1 + download_retry` attempts.
        """
        path = os.path.join(self.local, self.split, to_basename or from_basename)
        info = self._infos.get(from_basename)
        if self.remote is None:
            raise UserError(f'{self.setting}: {from_basename} of {self.place} is missing. {how_to_make(self.local, self.split)}')
        part, attempts, fault, full = path + PART, 1 + self.download_retry, '', False
        for attempt in range(attempts):
            if attempt:
                log.warning('%s of %s: %s; fetching it again (%d of %d)', from_basename, self.place, fault, attempt,
                            self.download_retry)
                time.sleep(BACKOFF_S * 2 ** (attempt - 1) * SystemRandom().uniform(1, 1.5))
            Path(part).unlink(missing_ok=True)  # streaming fetches nothing where there is a file
            try:
                self._downloader.download(os.path.join(self.place, from_basename), part, self.download_timeout)
                found, full = _fault(part, info, self._hash_fetched if info else None), False
                if found is None:
                    os.replace(part, path)
                    return path
                fault = found
            except Exception as e:  # each object store has error classes of its own
                full = _is_full_disk(e)
                fault = 'it is missing' if isinstance(e, FileNotFoundError) else f'{type(e).__name__}: {first_line(e)}'
                self._downloader.clean_up()
                if wrong := not_writable(os.path.dirname(path)):
                    raise UserError(f'{self.setting}.local: {from_basename} of {self.place} cannot be copied to '
                                    f'{self.local}: {wrong} cannot be written. Set data_local to a folder on a disk of '
                                    'this machine') from e
            for left in Path(path).parent.glob(os.path.basename(part) + '*'):
                left.unlink(missing_ok=True)
        if full:
            free = shutil.disk_usage(os.path.dirname(path)).free
            size = f' ({info.bytes:,} bytes)' if info else ''
            raise UserError(f'{self.setting}.local: the disk of {os.path.dirname(path)} is full ({free:,} bytes free): no space '
                            f'for {from_basename} of {self.place}{size}; make room, set cache_limit, or choose a data_local '
                            'on another disk')
        check = 'the address, the network and the credentials, and that the data is whole there' if is_url(self.remote) else \
            'that the data is whole there'
        raise UserError(f'{self.setting}.remote: {from_basename} of {self.place} could not be had in {attempts} attempts: '
                        f'{fault}. Check {check}')

    def _decompress_shard_part(self, zip_info: FileInfo, zip_filename: str, raw_filename: str,
                               compression: Optional[str]) -> None:
        what = ''
        for attempt in range(1 + (self.download_retry if self.remote is not None else 0)):
            if attempt:  # damaged on its way, in an index without hashes
                log.warning('%s of %s: %s; fetching it again (%d of %d)', zip_info.basename, self.place, what, attempt,
                            self.download_retry)
                Path(zip_filename).unlink(missing_ok=True)
                self._download_file(zip_info.basename)
            # Under a name of its own: another dataset or job may unpack the same shard in the same folder.
            unpacked = f'{raw_filename}{PART}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}'
            try:
                super()._decompress_shard_part(zip_info, zip_filename, unpacked, compression)
                os.replace(unpacked, raw_filename)
                return
            except Exception as e:  # each compression has error classes of its own
                if os.path.exists(unpacked + '.tmp'):
                    os.remove(unpacked + '.tmp')
                what = 'no space left to unpack it' if _is_full_disk(e) else f'{type(e).__name__}: {first_line(e)}'
                if _is_full_disk(e):
                    break
        raise UserError(f'{self.setting}.local: {zip_filename}, of {self.place}, cannot be unpacked: {what}. Make room '
                        'on its disk, or mend the shard where it lies')


class CheckedDataset(StreamingDataset):
    """A StreamingDataset in which a shard that cannot be had is an error of whoever reads it, in every worker and rank.

    Args:
        **kwargs: StreamingDataset's own.
    """

    def __init__(self, **kwargs: Any) -> None:
        self._failed: dict[int, Exception] = {}  # by shard
        super().__init__(**kwargs)

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Has a shard fetched, unless it is here or somebody is at it.

        A shard that was prefetched in vain (`blocking` false) is an error once it is read.
        """
        if not blocking and not self.cache_limit and not self.shards[shard_id].compression \
                and self._shard_states[shard_id] == _ShardState.LOCAL:
            return  # streaming would take the cache's file lock for each sample
        if shard_id not in self._failed:
            try:
                super().prepare_shard(shard_id, blocking)
            except Exception as e:
                # A traceback would keep the frame, and with it the cache's file lock if that is held.
                self._failed[shard_id] = e.with_traceback(None)
                # Streaming leaves it as PREPARING, and other workers would wait for that to end.
                self._shard_states[shard_id] = _ShardState.REMOTE
        if blocking and shard_id in self._failed:
            raise self._failed[shard_id]

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        # A shard may be evicted between its arrival and the read, and under load many times.
        return super().get_item(sample_id, RETRIES_UNDER_CACHE_LIMIT if self.cache_limit else retry)

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0:
            # After an epoch Composer counts 0 samples of the next one, whereas streaming goes on to it only when it is begun,
            # and would resume with the epoch that has just ended.
            state['epoch'] = max(state['epoch'], self.next_epoch)
        return state

    def load_state_dict(self, obj: Optional[dict[str, Any]]) -> None:
        if obj is None:
            raise UserError('the checkpoint holds no place in these samples: its run packed them on the fly. Go on with '
                            'that data, or start a new run from its weights with load_weights_only=true')
        super().load_state_dict(obj)
        # Streaming takes these from the state for the epoch that it resumes; they must hold in later ones, too.
        self.num_canonical_nodes, self.shuffle_seed = obj['num_canonical_nodes'], obj['shuffle_seed']

    # The next three: streaming's yield loop waits for a thread which waits until a shard is LOCAL. That is for ever, where the
    # shard was evicted again between two looks, or where another worker failed to fetch it. But `get_item` itself waits for a
    # shard, or fetches it, so nobody has to wait before it.

    def _each_sample_id(self, it: _Iterator) -> Iterator[int]:
        for sample_id in it.sample_ids:
            if it.should_exit():
                break
            if sample_id != -1:
                yield sample_id
            it.yield_index += 1
        it.on_exit()

    def _ready_thread(self, it: _Iterator) -> None:
        it.on_exit()

    def _prepare_thread(self, it: _Iterator) -> None:
        """Prefetches the shards of up to `predownload` samples ahead of the one that is read."""
        assert self.predownload is not None
        for i, sample_id in enumerate(it.sample_ids):
            while i - it.yield_index > self.predownload and not it.should_exit():
                time.sleep(TICK)
            if it.should_exit():
                break
            if i >= it.yield_index and sample_id != -1:
                self.prepare_shard(self.spanner[sample_id][0], blocking=False)
        it.on_exit()


def held_by(stream: CheckedStream, shard: Any, max_seq_len: int) -> str:
    """What a stream with this shard holds, in words that are the same for streams that can be read together.

    Returns:
        `text`, or of which length the sequences of tokens are.

    Raises:
        UserError: Neither, or the sequences do not fit `max_seq_len`.
    """
    if not hasattr(shard, 'column_encodings'):
        raise UserError(f'{stream.setting}: {stream.place} holds no shards of the format MDS; write it by MDSWriter')
    encodings = dict(zip(shard.column_names, shard.column_encodings))
    if 'tokens' not in encodings:
        if 'text' not in encodings:
            raise UserError(f"{stream.setting}: {stream.place} has no column 'text' (documents) and no column 'tokens' "
                            f'(sequences); its columns are {shard.column_names}')
        if encodings['text'] not in ('str', 'json'):
            raise UserError(f"{stream.setting}: column 'text' of {stream.place} is {encodings['text']!r}; it must be 'str'")
        return 'text'
    encoding, dtype, shape = (encodings['tokens'] + '::').split(':')[:3]  # as ndarray:uint16:128; the last two may be missing
    if encoding != 'ndarray' or (dtype and not dtype.startswith(('int', 'uint'))):
        raise UserError(f"{stream.setting}: column 'tokens' of {stream.place} is {encodings['tokens']!r}; it must hold arrays "
                        "of integers, as 'ndarray:uint16' does")
    if shape:
        _check_shape(tuple(map(int, shape.split(','))), max_seq_len, stream.place)
        return f'sequences of {shape} tokens'
    if Path(shard.dirname, shard.split, shard.raw_data.basename).is_file():
        check_tokens(shard[0]['tokens'], max_seq_len, stream.place)
    return 'sequences of tokens'


def check_tokens(tokens: NDArray, max_seq_len: int, place: str) -> None:
    """Raises a UserError where a row of the column `tokens` is no sequence of `max_seq_len` integers, or one more."""
    if tokens.dtype.kind not in 'iu':
        raise UserError(f"dataset: column 'tokens' of {place} holds {tokens.dtype}; it must hold integers")
    _check_shape(tokens.shape, max_seq_len, place)


def _check_shape(shape: tuple[int, ...], max_seq_len: int, place: str) -> None:
    if len(shape) != 1:
        raise UserError(f"dataset: column 'tokens' of {place} holds arrays of shape {shape}; each must be one sequence, "
                        f'of shape ({max_seq_len},) or ({max_seq_len + 1},)')
    if shape[0] not in (max_seq_len, max_seq_len + 1):
        raise UserError(f'dataset.max_seq_len: {max_seq_len}, but the sequences in {place} have {shape[0]} tokens; set '
                        f'max_seq_len={shape[0]}, or {shape[0] - 1} (then each has a target at its last position too), or make '
                        f'the data anew with sequences of {max_seq_len} or {max_seq_len + 1}')


class _CleanErrors:
    """For a DataLoader: a UserError of a worker is its message, without the traceback that torch puts around it.

    The loss of a worker is a UserError too where the cause is known.
    """

    setting: str

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from super().__iter__()  # pyright: ignore[reportAttributeAccessIssue]
            return
        except UserError as e:
            message = str(e).rpartition(f'{UserError.__module__}.{UserError.__qualname__}: ')[2].rstrip()
            e.__traceback__ = None  # torch has made a cycle of it; collected as garbage, each worker would take 5 s to end
        except (RuntimeError, OSError) as e:
            if (why := explain_lost_worker(e, self.setting)) is None:
                raise
            message = why
        raise UserError(message)  # not in the handler, where the first error would be its context


class TrainLoader(_CleanErrors, StreamingDataLoader):
    """StreamingDataLoader, with the messages of workers as they are."""

    setting = 'train_loader'


class EvalLoader(_CleanErrors, DataLoader):
    """DataLoader, with the messages of workers as they are."""

    setting = 'eval_loader'

"""Fixes StreamingDataset and its DataLoaders: a shard that cannot be fetched ends the run with one message."""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any, Optional

from streaming import StreamingDataLoader, StreamingDataset
from streaming.base.constant import TICK
from streaming.base.dataset import _Iterator, _ShardState
from torch.utils.data import DataLoader

from src.common.errors import UserError
from src.common.machine import explain_lost_worker
from src.config.data_places import explain_streaming_error
from src.loader.patches import patch_streaming
from src.loader.shared_memory import opening_a_dataset, remove_locks_at_exit
from src.loader.streams import CheckedStream

RETRIES_UNDER_CACHE_LIMIT = 1000

patch_streaming()  # at import: loader workers need the changes too, and so does a loader of your own built on streaming


class CheckedDataset(StreamingDataset):
    """A StreamingDataset that raises the error of a failed shard in every worker and rank that reads the shard.

    Streaming 0.13.0 raises such an error in a thread, and leaves the shard in the state "being prepared". Other workers
    then wait for it forever.

    Args:
        streams: The keywords of a CheckedStream for each stream, by the setting that names the stream in messages.
        **kwargs: StreamingDataset's own keywords.

    Raises:
        UserError: The data is missing or cannot be read.
    """

    streams: list[CheckedStream]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, streams: Mapping[str, Mapping[str, Any]], **kwargs: Any) -> None:
        self._errors: dict[int, Exception] = {}  # by number of the shard
        opened = [CheckedStream(name, kwargs.get('cache_limit'), **stream) for name, stream in streams.items()]
        self.place = ', '.join(stream.place for stream in opened)
        try:
            copied = [stream for stream in opened if stream.remote is not None]
            with opening_a_dataset([os.path.abspath(os.path.join(stream.local, stream.split)) for stream in copied]):
                super().__init__(streams=opened, **kwargs)
        except UserError:
            raise
        except (OSError, ValueError, RuntimeError, KeyError) as e:
            raise UserError(explain_streaming_error(e, opened[0].remote, opened[0].local, opened[0].split)) from None
        remove_locks_at_exit(self._shm_prefix_int)

    @property
    def fingerprint(self) -> str:
        """A hash of the indices and of each stream's weight. Ranks that read the same data have the same hash."""
        shards: Any = self.shards
        identity = [[[s.column_names, s.column_encodings, s.samples, vars(s.raw_data)] for s in shards],
                    [[int(n), int(stream.choose)] for n, stream in zip(self.shards_per_stream, self.streams)]]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetches a shard, unless it is in `local` or another worker is fetching it.

        An error in prefetching (`blocking` false) is kept, and raised when the shard is read.
        """
        if not blocking and not self.cache_limit and not self.shards[shard_id].compression \
                and self._shard_states[shard_id] == _ShardState.LOCAL:
            return  # streaming would take the cache's file lock for each sample
        if shard_id not in self._errors:
            try:
                super().prepare_shard(shard_id, blocking)
            except Exception as e:
                # The traceback would keep the frame alive, and with it the cache's file lock if the frame holds it.
                self._errors[shard_id] = e.with_traceback(None)
                # Streaming leaves the state PREPARING, and other workers would wait for its end.
                self._shard_states[shard_id] = _ShardState.REMOTE
        if blocking and shard_id in self._errors:
            raise self._errors[shard_id]

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        # The cache may delete a shard again before it is read; under load, many times in a row.
        return super().get_item(sample_id, RETRIES_UNDER_CACHE_LIMIT if self.cache_limit else retry)

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0:
            # At the end of an epoch Composer already counts 0 samples of the next one. Streaming changes to the next
            # epoch only when it starts, so it would resume with the epoch that has just ended.
            state['epoch'] = max(state['epoch'], self.next_epoch)
        return state

    def load_state_dict(self, obj: Optional[dict[str, Any]]) -> None:
        if obj is None:
            raise UserError('the checkpoint does not say which samples its run has read: the run packed them on the '
                            'fly. Resume with the data of that run, or start a new run from its weights with '
                            'load_weights_only=true')
        super().load_state_dict(obj)
        # Streaming uses these two for the epoch that it resumes. Later epochs must keep the same order.
        self.num_canonical_nodes, self.shuffle_seed = obj['num_canonical_nodes'], obj['shuffle_seed']

    # In streaming, the loop over samples waits for a thread that waits until a shard is LOCAL. The thread waits forever
    # if the shard is deleted again between two looks, or if another worker failed to fetch it. `get_item` waits for a
    # shard, or fetches it, so the next three methods do not wait.

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


class _CleanErrors:
    """Mixin for a DataLoader: raises a worker's UserError without the traceback that torch adds to its message.

    Raises UserError also where a worker died and the cause is known.
    """

    setting: str

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from super().__iter__()  # pyright: ignore[reportAttributeAccessIssue]
            return
        except UserError as e:
            message = str(e).rpartition(f'{UserError.__module__}.{UserError.__qualname__}: ')[2].rstrip()
            e.__traceback__ = None  # it is part of a reference cycle, because of which each worker would end 5 s late
        except (RuntimeError, OSError) as e:
            if (cause := explain_lost_worker(e, self.setting)) is None:
                raise
            message = cause
        raise UserError(message)  # outside of the handler: inside, the first error would become the context


class TrainLoader(_CleanErrors, StreamingDataLoader):
    """StreamingDataLoader that raises a worker's UserError with its own message."""

    setting = 'train_loader'


class EvalLoader(_CleanErrors, DataLoader):
    """DataLoader that raises a worker's UserError with its own message."""

    setting = 'eval_loader'

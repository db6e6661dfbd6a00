"""StreamingDataset and the DataLoaders over it, mended: what cannot be had ends the run in one message."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
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

patch_streaming()  # as this is imported: by the processes of loader workers, too, and before a loader of the user's own


class CheckedDataset(StreamingDataset):
    """A StreamingDataset in which a shard that cannot be had is an error of whoever reads it, in every worker and rank.

    Streaming 0.13.0 leaves a shard that failed in the state "being prepared", for which other workers wait for ever,
    and raises in threads. `streams` holds, by the setting that names each, the keywords of a CheckedStream; `kwargs`
    are StreamingDataset's own. Raises UserError where the data is missing or cannot be read.
    """

    streams: list[CheckedStream]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, streams: Mapping[str, Mapping[str, Any]], **kwargs: Any) -> None:
        self._failed: dict[int, Exception] = {}  # by shard
        opened = [CheckedStream(name, kwargs.get('cache_limit'), **stream) for name, stream in streams.items()]
        self.place = ', '.join(stream.place for stream in opened)
        try:
            with opening_a_dataset():
                super().__init__(streams=opened, **kwargs)
        except UserError:
            raise
        except (OSError, ValueError, RuntimeError, KeyError) as e:
            raise UserError(explain_streaming_error(e, opened[0].remote, opened[0].local, opened[0].split)) from None
        remove_locks_at_exit(self._shm_prefix_int)

    @property
    def fingerprint(self) -> str:
        """A digest of the indices and of each stream's weight: ranks that read the same data have the same."""
        shards: Any = self.shards
        says = [[[s.column_names, s.column_encodings, s.samples, asdict(s.raw_data)] for s in shards],
                [[int(n), int(stream.choose)] for n, stream in zip(self.shards_per_stream, self.streams)]]
        return hashlib.sha256(json.dumps(says, sort_keys=True).encode()).hexdigest()[:16]

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
            # After an epoch Composer counts 0 samples of the next one, whereas streaming goes on to it only when it is
            # begun, and would resume with the epoch that has just ended.
            state['epoch'] = max(state['epoch'], self.next_epoch)
        return state

    def load_state_dict(self, obj: Optional[dict[str, Any]]) -> None:
        if obj is None:
            raise UserError('the checkpoint holds no place in these samples: its run packed them on the fly. Go on '
                            'with that data, or start a new run from its weights with load_weights_only=true')
        super().load_state_dict(obj)
        # Streaming takes these from the state for the epoch that it resumes; they must hold in later ones, too.
        self.num_canonical_nodes, self.shuffle_seed = obj['num_canonical_nodes'], obj['shuffle_seed']

    # The next three: streaming's yield loop waits for a thread which waits until a shard is LOCAL. That is for ever
    # where the shard was evicted again between two looks, or where another worker failed to fetch it. But `get_item`
    # itself waits for a shard, or fetches it, so nobody has to wait before it.

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
            e.__traceback__ = None  # torch has made a cycle of it; as garbage, each worker would take 5 s to end
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

"""Why a rank ended, and where it tells the others; src/ranks/failure_watch.py ends them."""

import contextlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import TimeoutError as NoAnswer
from datetime import timedelta
from typing import Any, NamedTuple, Optional

import torch.distributed

from src.common.machine import low_shared_memory_hint
from src.common.workers import run_in_background
from src.ranks.environment import Process

STORE_TIMEOUT_S = 5.0  # for a word to the store: one whose machine has vanished does not answer, ever
WAIT_FOR_RANKS_S = 600.0  # how long ranks that are done wait for each other: a logger may take minutes to send its last


class Failure(NamedTuple):
    """Why a rank ended: in one line, and what a terminal is to show besides, such as a traceback."""

    rank: int
    node: int
    host: str
    summary: str
    text: str = ''
    shown: Sequence[int] = ()  # the `own_stderr` on which the text is already

    @classmethod
    def by_death(cls, me: Process, local_rank: int) -> 'Failure':
        """The failure of a rank on this node whose process died without a message."""
        rank = me.rank - me.local_rank + local_rank
        return cls(rank, me.node, me.host, f'its process died{low_shared_memory_hint()}')

    def __str__(self) -> str:
        return f'rank {self.rank} on node {self.node} ({self.host}) failed: {self.summary}'


def own_stderr() -> list[int]:
    """Tells what this process writes its errors to from what others do."""
    status = os.fstat(2)
    return [status.st_dev, status.st_ino]


class Board:
    """Where the ranks of a run leave word: the TCP store of the default process group."""

    def __init__(self, me: Process) -> None:
        self.me = me
        # A client of its own: what blocks in the group's client blocks everyone who uses it. Under torchrun the agent
        # has the store, and keeps it over a restart.
        dist: Any = torch.distributed  # its type stubs hide the stores
        store = dist.TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), is_master=False,
                              wait_for_workers=False, timeout=timedelta(seconds=30))
        attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
        self._store = dist.PrefixStore(f'failure-watch/{attempt}', store)
        self._store.set(f'pid/{me.rank}', str(me.pid))

    def publish(self, failure: Failure) -> None:
        """Tells all ranks; the first failure of a run is the one that counts."""
        answer = run_in_background(lambda: self._store.compare_set('failure', '', json.dumps(failure)))
        with contextlib.suppress(RuntimeError, NoAnswer):  # the store is gone, which is how the others learn of it
            answer.result(STORE_TIMEOUT_S)

    def other_failure(self, dead: Iterable[int]) -> Optional[Failure]:
        """What ended another rank: its own word, the death of one on this node, or the loss of the store.

        `dead` are the local ranks whose process has ended.
        """
        try:
            if self._store.check(['failure']):
                failure = Failure(*json.loads(self._store.get('failure')))
                return failure if failure.rank != self.me.rank else None
            for local_rank in dead:
                failure = Failure.by_death(self.me, local_rank)
                if not self._store.check([f'left/{failure.rank}']):
                    return failure
        except RuntimeError:  # torch's DistNetworkError: whoever served the store is gone
            return Failure(0, 0, os.environ['MASTER_ADDR'], 'its process is gone')
        return None

    def pids(self) -> list[int]:
        """The processes of this node's ranks, by local rank; none as long as one is not known."""
        first = self.me.rank - self.me.local_rank
        keys = [f'pid/{i}' for i in range(first, first + self.me.local_world_size)]
        with contextlib.suppress(RuntimeError):  # `other_failure` finds the cause
            if self._store.check(keys):
                return [int(self._store.get(key)) for key in keys]
        return []

    def leave(self) -> None:
        """Returns once all ranks are done; on rank 0, with whose process the store ends, once all have read that."""
        with contextlib.suppress(RuntimeError):  # the store went first, but this rank has done its work
            for key, waits in (('left', True), ('gone', self.me.rank == 0)):
                self._store.set(f'{key}/{self.me.rank}', '')
                keys = [f'{key}/{i}' for i in range(self.me.world_size)]
                deadline = time.monotonic() + WAIT_FOR_RANKS_S
                while waits and time.monotonic() < deadline and not self._store.check(keys):
                    time.sleep(0.05)

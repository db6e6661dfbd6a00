"""Publishes the failure of a rank in the TCP store; src/ranks/failure_watch.py then ends the other ranks."""

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

STORE_TIMEOUT_S = 5.0  # for writing to the store: a store whose machine has vanished never answers
WAIT_FOR_RANKS_S = 600.0  # how long finished ranks wait for each other: a logger may need minutes to send its last data


class Failure(NamedTuple):
    """Why a rank ended: one line for every terminal, and a text, such as a traceback, for the terminal of its node."""

    rank: int
    node: int
    host: str
    summary: str
    text: str = ''
    shown_on: Sequence[int] = ()  # the `own_stderr` to which the rank has already printed the text

    @classmethod
    def by_death(cls, me: Process, local_rank: int) -> 'Failure':
        """Makes the failure of a rank of this node whose process died without a message."""
        rank = me.rank - me.local_rank + local_rank
        return cls(rank, me.node, me.host, f'its process died{low_shared_memory_hint()}')

    def __str__(self) -> str:
        return f'rank {self.rank} on node {self.node} ({self.host}) failed: {self.summary}'


def own_stderr() -> list[int]:
    """Identifies the file or terminal that is the stderr of this process."""
    status = os.fstat(2)
    return [status.st_dev, status.st_ino]


class FailureBoard:
    """Writes and reads failures of ranks, as keys in the TCP store of the default process group."""

    def __init__(self, me: Process) -> None:
        self.me = me
        # A client of its own: a call that blocks in the group's client would block all its users. Under torchrun the
        # store belongs to the agent and outlives a restart, so the keys carry the number of the attempt.
        dist: Any = torch.distributed  # its type stubs hide the stores
        store = dist.TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), is_master=False,
                              wait_for_workers=False, timeout=timedelta(seconds=30))
        attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
        self._store = dist.PrefixStore(f'failure-watch/{attempt}', store)
        self._store.set(f'pid/{me.rank}', str(me.pid))

    def publish(self, failure: Failure) -> None:
        """Writes a failure for all ranks to read. Only the first failure of a run is kept."""
        answer = run_in_background(lambda: self._store.compare_set('failure', '', json.dumps(failure)))
        with contextlib.suppress(RuntimeError, NoAnswer):  # the store is gone: the others notice that too
            answer.result(STORE_TIMEOUT_S)

    def other_failure(self, dead: Iterable[int]) -> Optional[Failure]:
        """Finds the failure of another rank: one that it published, its death on this node, or the loss of the store.

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
        except RuntimeError:  # torch's DistNetworkError: the process with the store is gone
            return Failure(0, 0, os.environ['MASTER_ADDR'], 'its process is gone')
        return None

    def pids(self) -> list[int]:
        """Process numbers of this node's ranks, by local rank; empty until all of them are known."""
        first = self.me.rank - self.me.local_rank
        keys = [f'pid/{i}' for i in range(first, first + self.me.local_world_size)]
        with contextlib.suppress(RuntimeError):  # `other_failure` reports the loss of the store
            if self._store.check(keys):
                return [int(self._store.get(key)) for key in keys]
        return []

    def leave(self) -> None:
        """Waits until all ranks are done. Rank 0, which hosts the store, then waits until all ranks have seen this."""
        with contextlib.suppress(RuntimeError):  # the store ended first, but this rank has done its work
            for key, waits in (('left', True), ('gone', self.me.rank == 0)):
                self._store.set(f'{key}/{self.me.rank}', '')
                keys = [f'{key}/{i}' for i in range(self.me.world_size)]
                deadline = time.monotonic() + WAIT_FOR_RANKS_S
                while waits and time.monotonic() < deadline and not self._store.check(keys):
                    time.sleep(0.05)

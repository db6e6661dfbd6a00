"""Ends every rank, on every node, soon after one has failed."""

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta
from typing import Any, Optional

from src.common.errors import UserError, first_line
from src.common.machine import shared_memory_is_low
from src.ranks.stop import Stopped, StopRequest

log = logging.getLogger('src')

POLL_S = 1.0
ALONE_S = 10.0  # how long a rank with a UserError waits for rank 0 to say the same
LEAVE_S = 600.0  # how long ranks that are done wait for each other: a logger may take minutes to send its last


def _stderr() -> list[int]:
    status = os.fstat(2)
    return [status.st_dev, status.st_ino]


class FailureWatch:
    """Ends every rank, on every node, soon after one has failed: the others would wait for it in a collective.

    The word goes through the TCP store of the default process group. A rank that fails leaves its traceback there; local
    rank 0 of its node, whose stderr is the terminal's, prints it; every other rank says whom it follows and exits with 1.

    A context manager that begins with the process group: on entering, or at `start`. Without several ranks it does nothing
    but `report_crash`. Leaving without an exception is the good end, which rank 0, with the store, is the last to reach.
    """

    def __init__(self, stop: Optional[StopRequest] = None) -> None:
        self.stop = stop or StopRequest()
        self._store: Any = None
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._shown = self._failed = False
        env = os.environ
        self.rank, self.local_rank = int(env.get('RANK', 0)), int(env.get('LOCAL_RANK', 0))
        self.world_size, self.local_world_size = int(env.get('WORLD_SIZE', 1)), int(env.get('LOCAL_WORLD_SIZE', 1))
        self.node, self.host = int(env.get('NODE_RANK', env.get('GROUP_RANK', 0))), socket.gethostname()

    def __enter__(self) -> 'FailureWatch':
        self.start()
        return self

    def start(self, stop: Optional[StopRequest] = None) -> None:
        """Begins to watch if the default process group is up and has several ranks; `stop` then learns their processes."""
        import torch.distributed

        dist: Any = torch.distributed  # its type stubs hide the stores
        self.stop = stop or self.stop
        if self._store is not None or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        # A client of its own: what blocks in the group's client blocks everyone who uses it. Under torchrun the agent has
        # the store, and keeps it over a restart.
        attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
        store = dist.TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), is_master=False,
                              wait_for_workers=False, timeout=timedelta(seconds=30))
        self._store = dist.PrefixStore(f'failure-watch/{attempt}', store)
        self._store.set(f'pid/{self.rank}', str(os.getpid()))
        self._thread = threading.Thread(target=self._poll, name='failure-watch', daemon=True)
        self._thread.start()

    def __exit__(self, kind: Optional[type[BaseException]], *_: object) -> None:
        if self._store is None or self._failed or (kind is not None and not issubclass(kind, Stopped)):
            return
        with contextlib.suppress(RuntimeError):  # the store went first, but this rank has done its work
            # Together: the launcher takes the first to exit with another code than 0 for a crash, and signals the others.
            self._leave('left', range(self.world_size))
            if self.rank == 0:
                self._leave('gone', range(1, self.world_size))  # they read from the store that ends with this process
            else:
                self._store.set(f'gone/{self.rank}', '')
        self._ended.set()
        self._thread.join()

    def _leave(self, key: str, ranks: range) -> None:
        self._store.set(f'{key}/{self.rank}', '')
        deadline = time.monotonic() + LEAVE_S
        while time.monotonic() < deadline and not self._store.check([f'{key}/{i}' for i in ranks]):
            time.sleep(0.05)

    def ignore_signals(self) -> None:
        """For a rank that ends with others: what the launcher sends once the first of them has gone changes nothing."""
        if self.world_size > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def announce(self, summary: str, text: str = '') -> None:
        """Tells all ranks that this one fails; the first announcement of a run is the one that counts.

        Args:
            summary: One line.
            text: What the terminal of this node is to show besides, such as a traceback.
        """
        self._publish(self._failure(self.rank, summary, text))

    def report_crash(self, error: BaseException) -> None:
        """Prints why this rank ends and tells the others; the process should exit with code 1 next.

        A `UserError` is one message without a traceback; as every rank meets the same one, rank 0 speaks for them. An error
        that follows from the end of another rank is one line.
        """
        self._failed = True
        mistake = isinstance(error, UserError)
        # A lost connection is seldom the cause: the rank that has one may be about to say so.
        patience = ALONE_S if mistake and self.rank else 2 * POLL_S if 'onnection' in str(error) else 0
        deadline = time.monotonic() + (patience if self.world_size > 1 else 0)
        while (other := self._other_failure()) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if other:
            self._follow(other)
            return
        text = f'error: {error}' if mistake else ''.join(traceback.format_exception(error)).rstrip()
        if self.world_size > 1 and not (mistake and self.rank == 0):
            text = f'rank {self.rank} on node {self.node} ({self.host}):\n{text}'
        print(text, file=sys.stderr, flush=True)
        self.announce(f'{"error" if mistake else type(error).__name__}: {first_line(error)}', text)
        if self._store is not None:
            time.sleep(2 * POLL_S)  # time for all to read it: this node's local rank 0 shows it, the store may end with this rank

    def _failure(self, rank: int, summary: str, text: str = '') -> dict[str, Any]:
        return {'rank': rank, 'node': self.node, 'host': self.host, 'summary': summary, 'text': text, 'seen': _stderr()}

    def _other_failure(self) -> Optional[dict[str, Any]]:
        """What ended another rank, if anything did: by its own word, a dead process of this node, or the loss of the store."""
        if self._store is None:
            return None
        try:
            if self._store.check(['failure']):
                failure = json.loads(self._store.get('failure'))
                return failure if failure['rank'] != self.rank else None
            for i in self.stop.dead_siblings():
                rank = self.rank - self.local_rank + i
                if not self._store.check([f'left/{rank}']):
                    return self._failure(rank, f'its process died{shared_memory_is_low()}')
        except RuntimeError:  # torch's DistNetworkError: whoever served the store is gone
            return {'rank': 0, 'node': 0, 'host': os.environ['MASTER_ADDR'], 'summary': 'its process is gone',
                    'text': ''}
        return None

    def _publish(self, failure: dict[str, Any]) -> None:
        def publish() -> None:
            with contextlib.suppress(RuntimeError):  # the store is gone, which is how the others learn of it
                self._store.compare_set('failure', '', json.dumps(failure))

        if self._store is not None:  # a store whose machine has vanished does not answer, ever
            thread = threading.Thread(target=publish, daemon=True)
            thread.start()
            thread.join(5 * POLL_S)

    def _follow(self, failure: dict[str, Any]) -> None:
        """Passes on and shows, once, why another rank ended and this one does."""
        self._publish(failure)
        with self._lock:  # the main thread, the signal's and the store's may come at once
            if not self._shown:
                self._shown = True
                on_my_terminal = failure['node'] == self.node and self.local_rank == 0
                if failure['text'] and on_my_terminal and failure['seen'] != _stderr():  # torchrun's ranks share one
                    print(failure['text'], file=sys.stderr)
                print(f'rank {failure["rank"]} on node {failure["node"]} ({failure["host"]}) failed: {failure["summary"]}; '
                      f'this rank ({self.rank} on node {self.node}) stops', file=sys.stderr, flush=True)
        if self.rank == 0:
            time.sleep(2 * POLL_S)  # the store may end with this process: the others are to read the cause first

    def _sibling_died(self, local_rank: int) -> None:
        self._follow(self._other_failure() or self._failure(
            self.rank - self.local_rank + local_rank, f'its process died{shared_memory_is_low()}'))

    def _poll(self) -> None:
        first = self.rank - self.local_rank
        pids = [f'pid/{i}' for i in range(first, first + self.local_world_size)]
        while not self._ended.wait(0.1 if pids else POLL_S):
            failure = self._other_failure()
            if failure and not self._ended.is_set():
                self._follow(failure)
                os._exit(1)
            with contextlib.suppress(RuntimeError):  # the next round finds the cause
                if pids and self._store.check(pids):
                    self.stop.watch_siblings([int(self._store.get(key)) for key in pids], self._sibling_died)
                    pids = []

"""Ends every rank, on every node, soon after one has failed."""

import os
import signal
import sys
import threading
import time
import traceback
from typing import Optional

import torch.distributed

from src.common.errors import UserError, first_line
from src.ranks.environment import this_process
from src.ranks.failure_board import STORE_TIMEOUT_S, Board, Failure, own_stderr
from src.ranks.stop import Stopped, StopRequest

POLL_S = 1.0
READ_FAILURE_S = 2 * POLL_S  # in which all ranks read why one ends
EXIT_TIMEOUT_S = 30.0  # how long a rank that has failed may take to end
WAIT_FOR_RANK_0_S = 10.0  # how long a rank with a UserError waits for rank 0 to say the same


class FailureWatch:
    """Ends every rank, on every node, soon after one has failed: the others would wait for it in a collective.

    A rank that fails prints its traceback, and leaves it on the board; local rank 0 of its node, whose stderr is the
    terminal's, prints it too; every other rank says whom it follows and exits with 1.

    A context manager that begins with the process group: on entering, or at `start`. Without several ranks it does
    nothing but `report_crash`. Leaving without an exception is the good end, which all ranks reach together: the
    launcher takes the first to exit with another code than 0 for a crash, and signals the others.
    """

    def __init__(self, stop: Optional[StopRequest] = None) -> None:
        self.stop, self.me = stop or StopRequest(), this_process()
        self._board: Optional[Board] = None
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._shown = self._failed = False

    def __enter__(self) -> 'FailureWatch':
        self.start()
        return self

    def start(self) -> None:
        """Begins to watch if the default process group is up and has several ranks."""
        if self._board is None and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            self._board = Board(self.me)
            self._thread = threading.Thread(target=self._poll, args=[self._board], name='failure-watch', daemon=True)
            self._thread.start()

    def __exit__(self, kind: Optional[type[BaseException]], *_: object) -> None:
        if self._board is None or self._failed or (kind is not None and not issubclass(kind, Stopped)):
            return
        self._board.leave()
        self._ended.set()
        self._thread.join()

    def ignore_signals(self) -> None:
        """For a rank that ends with others: what the launcher sends once the first of them has gone changes nothing."""
        if self.me.world_size > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def report_crash(self, error: BaseException) -> None:
        """Prints why this rank ends and tells the others; the process should exit with code 1 next.

        A `UserError` is one message without a traceback; what follows from the end of another rank is one line.
        """
        self._failed = True
        mistake, patience = isinstance(error, UserError), 0.0
        if mistake and self.me.rank:  # all ranks meet the same one, and rank 0 speaks for them
            patience = WAIT_FOR_RANK_0_S
        elif 'onnection' in str(error):  # seldom the cause: the rank that has it may be about to say so
            patience = READ_FAILURE_S
        deadline = time.monotonic() + (patience if self.me.world_size > 1 else 0)
        while (other := self._other_failure()) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if other:
            self._follow(other)
            self._end()
            return
        text = f'error: {error}' if mistake else ''.join(traceback.format_exception(error)).rstrip()
        if self.me.world_size > 1 and not (mistake and self.me.rank == 0):
            text = f'rank {self.me.rank} on node {self.me.node} ({self.me.host}):\n{text}'
        print(text, file=sys.stderr, flush=True)
        if self._board is not None:
            kind = 'error' if mistake else type(error).__name__
            self.ignore_signals()  # with the first rank that follows the launcher ends all: its code is to be 1
            self._board.publish(Failure(self.me.rank, self.me.node, self.me.host, f'{kind}: {first_line(error)}', text,
                                        own_stderr()))
            time.sleep(READ_FAILURE_S)  # the board may end with this rank
            self._end()

    def _end(self) -> None:
        """Ends the watch: its thread would abort the process if it waited for the store's answer while Python ends."""
        self._ended.set()
        self._thread.join(STORE_TIMEOUT_S)
        last = threading.Timer(EXIT_TIMEOUT_S, os._exit, [1])  # a logger's thread or NCCL may block the exit
        last.daemon = True
        last.start()

    def _other_failure(self) -> Optional[Failure]:
        return self._board.other_failure(self.stop.dead_siblings()) if self._board else None

    def _follow(self, failure: Failure) -> None:
        """Passes on and shows, once, why another rank ended and this one does."""
        if self._board:
            self._board.publish(failure)
        with self._lock:  # the main thread, the signal's and the board's may come at once
            if not self._shown:
                self._shown = True
                is_here = failure.node == self.me.node and self.me.local_rank == 0
                if failure.text and is_here and failure.shown != own_stderr():  # torchrun's ranks share one
                    print(failure.text, file=sys.stderr)
                me = f'this rank ({self.me.rank} on node {self.me.node})'
                print(f'{failure}; {me} stops', file=sys.stderr, flush=True)
        if self.me.rank == 0:
            time.sleep(READ_FAILURE_S)  # the board may end with this process

    def _sibling_died(self, local_rank: int) -> None:
        self._follow(self._other_failure() or Failure.by_death(self.me, local_rank))

    def _poll(self, board: Board) -> None:
        known = False
        while not self._ended.wait(POLL_S if known else 0.1):
            failure = self._other_failure()
            if failure and not self._ended.is_set():
                self._follow(failure)
                os._exit(1)
            if not known and (pids := board.pids()):
                self.stop.watch_siblings(pids, self._sibling_died)
                known = True

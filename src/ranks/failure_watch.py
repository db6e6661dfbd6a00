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
from src.ranks.environment import WAIT_FOR_RANK_0_S, this_process
from src.ranks.failure_board import STORE_TIMEOUT_S, Failure, FailureBoard, own_stderr
from src.ranks.stop import Stopped, StopRequest

POLL_S = 1.0
READ_FAILURE_S = 2 * POLL_S  # time in which all ranks read why one ends
EXIT_TIMEOUT_S = 30.0  # how long a rank that has failed may take to end


class FailureWatch:
    """Ends every rank, on every node, soon after one has failed: the others would wait for it in a collective.

    A rank that fails prints its traceback and publishes it on the board. Local rank 0 of its node, whose stderr is the
    terminal, prints the traceback too. Every other rank prints one line that names the failed rank, and exits with 1.

    A context manager. It begins to watch when the process group is up: on entering, or at `start`. With a single rank
    only `report_crash` does something. Without an exception, all ranks leave together: the launcher takes the first
    exit code that is not 0 for a crash, and signals the other ranks.
    """

    def __init__(self, stop: Optional[StopRequest] = None) -> None:
        self.stop, self.me = stop or StopRequest(), this_process()
        self._board: Optional[FailureBoard] = None
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._shown = self._failed = False

    def __enter__(self) -> 'FailureWatch':
        self.start()
        return self

    def start(self) -> None:
        """Begins to watch, if the default process group is up and has several ranks."""
        if self._board is None and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            self._board = FailureBoard(self.me)
            self._thread = threading.Thread(target=self._poll, args=[self._board], name='failure-watch', daemon=True)
            self._thread.start()

    def __exit__(self, kind: Optional[type[BaseException]], *_: object) -> None:
        if self._board is None or self._failed or (kind is not None and not issubclass(kind, Stopped)):
            return
        self._board.leave()
        self._ended.set()
        self._thread.join()

    def ignore_signals(self) -> None:
        """Ignores SIGTERM and SIGINT from now on: the launcher sends them to the other ranks when one has ended."""
        if self.me.world_size > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def report_crash(self, error: BaseException) -> None:
        """Prints why this rank ends and tells the other ranks. Let the process exit with code 1 next.

        A `UserError` is printed without a traceback. If another rank has failed first, one line names that rank.
        """
        self._failed = True
        is_user_error, wait_s = isinstance(error, UserError), 0.0
        if is_user_error and self.me.rank:  # usually all ranks raise the same error, and rank 0 prints it for all
            wait_s = WAIT_FOR_RANK_0_S
        elif 'onnection' in str(error):  # usually a consequence: the rank with the cause may be about to report it
            wait_s = READ_FAILURE_S
        deadline = time.monotonic() + (wait_s if self.me.world_size > 1 else 0)
        while (other := self._other_failure()) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if other:
            self._follow(other)
            self._end()
            return
        text = f'error: {error}' if is_user_error else ''.join(traceback.format_exception(error)).rstrip()
        if self.me.world_size > 1 and not (is_user_error and self.me.rank == 0):
            text = f'rank {self.me.rank} on node {self.me.node} ({self.me.host}):\n{text}'
        print(text, file=sys.stderr, flush=True)
        if self._board is not None:
            kind = 'error' if is_user_error else type(error).__name__
            self.ignore_signals()  # the launcher sends SIGTERM when the first rank ends; this one has to exit with 1
            self._board.publish(Failure(self.me.rank, self.me.node, self.me.host, f'{kind}: {first_line(error)}', text,
                                        own_stderr()))
            time.sleep(READ_FAILURE_S)  # the board may end with this rank
            self._end()

    def _end(self) -> None:
        """Ends the watch: a thread that waits for the store while Python exits would abort the process."""
        self._ended.set()
        self._thread.join(STORE_TIMEOUT_S)
        forced_exit = threading.Timer(EXIT_TIMEOUT_S, os._exit, [1])  # a logger's thread or NCCL may block the exit
        forced_exit.daemon = True
        forced_exit.start()

    def _other_failure(self) -> Optional[Failure]:
        return self._board.other_failure(self.stop.dead_local_ranks()) if self._board else None

    def _follow(self, failure: Failure) -> None:
        """Publishes the failure of another rank, and prints once that this rank stops because of it."""
        if self._board:
            self._board.publish(failure)
        with self._lock:  # the main thread, the signal thread and the watch may call this at the same time
            if not self._shown:
                self._shown = True
                prints_text = failure.node == self.me.node and self.me.local_rank == 0
                if failure.text and prints_text and failure.shown_on != own_stderr():  # torchrun: one stderr for all
                    print(failure.text, file=sys.stderr)
                me = f'this rank ({self.me.rank} on node {self.me.node})'
                print(f'{failure}; {me} stops', file=sys.stderr, flush=True)
        if self.me.rank == 0:
            time.sleep(READ_FAILURE_S)  # the board may end with this process

    def _sibling_died(self, local_rank: int) -> None:
        self._follow(self._other_failure() or Failure.by_death(self.me, local_rank))

    def _poll(self, board: FailureBoard) -> None:
        knows_siblings = False
        while not self._ended.wait(POLL_S if knows_siblings else 0.1):
            failure = self._other_failure()
            if failure and not self._ended.is_set():
                self._follow(failure)
                os._exit(1)
            if not knows_siblings and (pids := board.pids()):
                self.stop.watch_local_ranks(pids, self._sibling_died)
                knows_siblings = True

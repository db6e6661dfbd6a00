"""Turns SIGTERM and Ctrl-C into a request to stop, which training carries out between two batches."""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Optional

log = logging.getLogger('src')

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request and saved; the same command goes on
SAME_REQUEST_S = 2.0  # one Ctrl-C reaches a rank twice: from the terminal, and from the launcher as SIGTERM


class Stopped(Exception):
    """Ends `trainer.fit()` once a requested stop has been carried out."""


def _start_time(pid: int) -> Optional[str]:
    """Returns when a process started, to tell it from a later process with the same pid; None if it has ended."""
    try:
        with open(f'/proc/{pid}/stat') as f:
            fields = f.read().rpartition(')')[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in 'ZX' else fields[19]


class StopRequest:
    """Turns SIGTERM and Ctrl-C into `requested`, which training reads between two batches.

    Training sets `agreed`, at the same batch on all ranks, when the request of any rank has reached all.

    A thread reads the signals, so that a signal has an effect while the main thread waits in a collective. A second
    signal, 2 s or more after the first, ends the process at once. So does the first, with exit code 1, when another
    rank of this node is dead: then the launcher sends the signal to end all ranks, and training would wait for ever.

    A context manager, for the main thread only. On leaving, it restores the previous handlers.
    """

    def __init__(self) -> None:
        self.requested = self.agreed = False
        self._siblings: list[tuple[int, Optional[str]]] = []
        self._on_death: Optional[Callable[[int], None]] = None

    def __enter__(self) -> 'StopRequest':
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        # Python writes to the descriptor only for signals that have a Python handler.
        self._old = {n: signal.signal(n, lambda *_: None) for n in (signal.SIGTERM, signal.SIGINT)}
        self._thread = threading.Thread(target=self._watch, name='stop-request', daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(self._old_fd)
        self._writer.send(b'\0')  # closing would not end the thread: loader workers hold copies of the descriptor
        self._thread.join()
        self._writer.close()
        self._reader.close()

    def watch_local_ranks(self, pids: Sequence[int], on_death: Optional[Callable[[int], None]] = None) -> None:
        """Sets the processes of this node's ranks; a signal that finds one dead calls `on_death(local_rank)`."""
        self._on_death = on_death
        self._siblings = [(pid, _start_time(pid)) for pid in pids]

    def dead_local_ranks(self) -> list[int]:
        """The local ranks whose process has ended, for whatever reason."""
        return [i for i, (pid, start) in enumerate(self._siblings) if start is None or _start_time(pid) != start]

    def _watch(self) -> None:
        first: Optional[float] = None
        while b'\0' not in (received := self._reader.recv(64)):
            for signum in received:
                if signum not in (signal.SIGTERM, signal.SIGINT):
                    continue
                if first is None:
                    first = time.monotonic()
                    if dead := self.dead_local_ranks():
                        if self._on_death:
                            self._on_death(dead[0])
                        os._exit(1)
                    self.requested = True
                    log.info('%s: finishing the batch, then saving and stopping; send the signal again to exit now',
                             signal.Signals(signum).name)
                elif time.monotonic() - first > SAME_REQUEST_S:
                    os._exit(128 + signum)

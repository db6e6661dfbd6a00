"""SIGTERM and Ctrl-C as a request that training answers between two batches."""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Optional

log = logging.getLogger('src')

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request, the state is saved; run again to go on
SAME_REQUEST_S = 2.0  # one Ctrl-C reaches a rank twice: from the terminal, and from the launcher as SIGTERM


class Stopped(Exception):
    """Ends `trainer.fit()` once a requested stop has been carried out."""


def _start_time(pid: int) -> Optional[str]:
    """Tells a process from a later one with its number; None once it is dead, reaped or not."""
    try:
        with open(f'/proc/{pid}/stat') as f:
            fields = f.read().rpartition(')')[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in 'ZX' else fields[19]


class StopRequest:
    """SIGTERM and Ctrl-C as a request that training answers between two batches.

    A thread reads the signals, so that they act while the main thread sits in a collective: the second one (2 s after
    the first, or later) ends the process at once. So does the first, with exit code 1, when another rank of this node
    is dead: then it is the launcher cleaning up, and the next collective would wait for ever.

    Main thread only. On leaving, the previous handlers are back.
    """

    def __init__(self) -> None:
        self.requested = False
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

    def watch_siblings(self, pids: Sequence[int], on_death: Optional[Callable[[int], None]] = None) -> None:
        """Names the processes of this node's ranks; `on_death(local_rank)` is called before this one ends."""
        if os.path.exists('/proc/self/stat'):
            self._on_death = on_death
            self._siblings = [(pid, _start_time(pid)) for pid in pids]

    def dead_siblings(self) -> list[int]:
        """The local ranks whose process has ended, however it did."""
        return [i for i, (pid, start) in enumerate(self._siblings) if start is None or _start_time(pid) != start]

    def _watch(self) -> None:
        first: Optional[float] = None
        while b'\0' not in (received := self._reader.recv(64)):
            for signum in received:
                if signum not in (signal.SIGTERM, signal.SIGINT):
                    continue
                if first is None:
                    first = time.monotonic()
                    if dead := self.dead_siblings():
                        if self._on_death:
                            self._on_death(dead[0])
                        os._exit(1)
                    self.requested = True
                    log.info('%s: finishing the batch, then saving and stopping; once more to exit now',
                             signal.Signals(signum).name)
                elif time.monotonic() - first > SAME_REQUEST_S:
                    os._exit(128 + signum)

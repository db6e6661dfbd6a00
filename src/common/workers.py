"""How worker processes begin and end: those of a launcher, of a DataLoader, of a conversion.

This module imports nothing that is slow.
"""

import ctypes
import multiprocessing
import multiprocessing.queues
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NoReturn

PR_SET_PDEATHSIG = 1
SETTLE_S = 0.05


def _die_with_parent(by: signal.Signals = signal.SIGKILL) -> None:
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(by))
    if os.getppid() != parent:  # it died before the kernel knew
        os._exit(1)


def stop_with_parent() -> None:
    """A subprocess's `preexec_fn`: when its parent dies, it is asked to stop."""
    _die_with_parent(signal.SIGTERM)


def die_with_launcher() -> None:
    """Has the kernel kill this rank when its launcher dies, which would leave it behind with its GPU.

    Not without a launcher: a plain `python main.py &` outlives its shell.
    """
    if 'RANK' in os.environ and 'LOCAL_RANK' in os.environ:
        _die_with_parent()


def let_threads_settle() -> None:
    """Gives gloo's threads time to drop the tensors of the last collective, for which they enter the interpreter.

    A loader worker that is forked in that moment never starts, up to Python 3.10.14 and 3.11.9:
    https://github.com/python/cpython/issues/112275
    """
    torch = sys.modules.get('torch')
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        time.sleep(SETTLE_S)


def init_loader_worker(worker_id: int) -> None:
    """A DataLoader's `worker_init_fn`: the worker ends with its rank, and only when its rank says so.

    Ctrl-C and Slurm signal the loader workers too, while their rank still needs them to finish its batch.
    """
    signal.set_wakeup_fd(-1)  # inherited: signals of the worker would arrive as the rank's
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_when_told, daemon=True).start()
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_exit_unsent)  # pyright: ignore
    _die_with_parent()


def _exit_unsent(error: Exception, _: Any) -> NoReturn:
    """Ends a worker that cannot send its batch. multiprocessing would drop the batch, and the rank wait for ever."""
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)


def init_conversion_worker(temporary: str) -> None:
    """A process pool's `initializer`: the worker ends with its parent, and Ctrl-C is the parent's to answer.

    `temporary` is the folder for temporary files, for the parent to remove: of a worker that is ended libraries leave
    theirs.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with_parent()
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it died while this process started
        os._exit(1)
    tempfile.tempdir = os.environ['TMPDIR'] = temporary
    from tqdm import tqdm

    # The lock that a bar makes itself is a semaphore, which stays behind when this worker is ended.
    tqdm.set_lock(threading.RLock())


def _exit_when_told() -> None:
    parent = multiprocessing.parent_process()
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        if sender == os.getppid() or (parent is not None and sender == parent.pid):
            os._exit(0)  # torch's own handler does the same


def run_in_background(call: Callable[[], Any]) -> Future:
    """Its result, from a daemon thread, unlike those of an executor: a process that fails does not wait for it."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as e:  # raised where the result is asked for
            future.set_exception(e)

    threading.Thread(target=run, daemon=True).start()
    return future

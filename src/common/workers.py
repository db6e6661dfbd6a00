"""Starts and ends worker processes: ranks of a launcher, workers of a DataLoader, workers of a conversion.

This module imports nothing slow.
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
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NoReturn

PR_SET_PDEATHSIG = 1  # of prctl(2): the kernel sends a signal when the parent dies
SETTLE_S = 0.05


def _die_with_parent(signum: signal.Signals = signal.SIGKILL) -> None:
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signum))
    if os.getppid() != parent:  # the parent died before the call of prctl
        os._exit(1)


def stop_with_parent() -> None:
    """Sends SIGTERM to this process when its parent dies. A `preexec_fn` of `subprocess.Popen`."""
    _die_with_parent(signal.SIGTERM)


def die_with_launcher() -> None:
    """Lets the kernel kill this rank when its launcher dies: otherwise the rank would keep its GPU.

    Does nothing without a launcher: `python main.py &` may outlive its shell.
    """
    if 'RANK' in os.environ and 'LOCAL_RANK' in os.environ:
        _die_with_parent()


def let_threads_settle() -> None:
    """Waits a moment before a fork, so that gloo's threads can free the tensors of the last collective.

    The threads hold the GIL while they free the tensors. A loader worker that is forked at that moment never starts, up
    to Python 3.10.14 and 3.11.9: https://github.com/python/cpython/issues/112275
    """
    torch = sys.modules.get('torch')
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        time.sleep(SETTLE_S)


def init_loader_worker(worker_id: int) -> None:
    """Sets up a loader worker: only its rank can stop it, and it dies with the rank. A DataLoader `worker_init_fn`.

    Ctrl-C and Slurm also send signals to loader workers, while the rank still needs them to finish its batch.
    """
    signal.set_wakeup_fd(-1)  # inherited from the rank, which would take the worker's signals for its own
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_on_signal_of_rank, daemon=True).start()
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_exit_on_send_error)  # pyright: ignore
    _die_with_parent()


def _exit_on_send_error(error: Exception, _: Any) -> NoReturn:
    """Ends a worker that cannot send its batch: without the batch, the rank would wait for ever."""
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)


def init_conversion_worker(temporary: str) -> None:
    """Lets a worker die with its parent and ignore Ctrl-C, which the parent handles. A process pool's `initializer`.

    `temporary` is the folder for temporary files. The parent removes it, because libraries leave files there when a
    worker is killed.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with_parent()
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # the parent died while this process started
        os._exit(1)
    tempfile.tempdir = os.environ['TMPDIR'] = temporary
    from tqdm import tqdm

    # By default tqdm makes a semaphore as its lock, which is left over when this worker is killed.
    tqdm.set_lock(threading.RLock())


def _exit_on_signal_of_rank() -> None:
    """Ends this worker when SIGTERM comes from its rank; SIGTERM of others has no effect."""
    parent = multiprocessing.parent_process()
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        if sender == os.getppid() or (parent is not None and sender == parent.pid):
            os._exit(0)  # torch's own handler does the same


def run_in_background(call: Callable[[], Any]) -> Future:
    """Calls in a daemon thread and returns a Future. Unlike with an executor, an exit does not wait for the thread."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as e:  # `Future.result` raises it
            future.set_exception(e)

    threading.Thread(target=run, daemon=True).start()
    return future


def map_in_threads(call: Callable[[Any], Any], items: Sequence[Any], threads: int = 16) -> list[Any]:
    """Calls `call` for each item, and returns the results in the order of the items.

    Each thread takes the next item when it is free; a Future for each item would cost more than a look at a file. After
    an error of `call`, or Ctrl-C, no thread begins another item. Raises the error of the first item that has one.
    """
    numbers, is_over = iter(range(len(items))), threading.Event()
    results: list[Any] = [None] * len(items)
    errors: dict[int, BaseException] = {}

    def work() -> None:
        while not is_over.is_set() and (i := next(numbers, None)) is not None:  # `next` is atomic
            try:
                results[i] = call(items[i])
            except BaseException as e:
                errors[i] = e
                is_over.set()

    with ThreadPoolExecutor(threads) as pool:
        try:
            wait([pool.submit(work) for _ in range(threads)])
        finally:
            is_over.set()
    try:
        if errors:
            raise errors[min(errors)]
        return results
    finally:
        errors.clear()  # the traceback of an error holds this frame, and what `call` holds

"""The order in which the files of a split are converted: side by side in processes, or one after another."""

import multiprocessing
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from src.common.errors import UserError
from src.common.machine import check_shared_memory
from src.common.workers import init_conversion_worker
from src.config.data_places import is_url
from src.conversion.parts import Job, Part, convert
from src.conversion.place import new_unfinished, open_place, sweep


def run(jobs: list[Job], num_workers: int, report: Callable[[Part], None]) -> None:
    """Makes the parts, those of one process in its order.

    Raises:
        UserError: What went wrong with the first part that failed; parts that are finished stay.
    """
    if num_workers == 1 or len(jobs) <= 1:
        for job in jobs:
            report(convert(job))
        return
    # A fork would copy the threads and locks of the clients of the hub and the object stores; a start takes 5 s.
    plain = sys.platform == 'linux' and not (is_url(jobs[0].file.path) or is_url(jobs[0].root))
    context = multiprocessing.get_context('fork' if plain else 'spawn')
    check_shared_memory(1 << 16, 'the queues of worker processes', '; or set --num_workers 1')
    temporary = new_unfinished(Path(tempfile.gettempdir()), 'workers')
    pool = ProcessPoolExecutor(min(num_workers, len(jobs)), context, init_conversion_worker, (str(temporary),))
    try:
        on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is this process's alone
        try:
            futures = [pool.submit(convert, job) for job in jobs]
        finally:
            signal.signal(signal.SIGINT, on_interrupt)
        for future in as_completed(futures):
            report(future.result())
    except BrokenProcessPool:
        raise UserError('--num_workers: a worker process was killed, perhaps for want of memory; run the same command '
                        f'again, with fewer than {num_workers}: it goes on') from None
    finally:
        for process in list((pool._processes or {}).values()):  # else the parts under way would be finished first
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(temporary, ignore_errors=True)
        sweep(open_place(jobs[0].root))


def run_in_order(jobs: list[Job], report: Callable[[Part], None]) -> list[Job]:
    """The first `max_docs` documents: how many a file has to give is known only when those before it are done.

    Returns:
        The jobs that it took.
    """
    left, taken = jobs[0].max_docs or 0, []
    for job in jobs:
        taken.append(job._replace(max_docs=left))
        part = convert(taken[-1])
        report(part)
        left -= part['documents']
        if left == 0:
            break
    return taken

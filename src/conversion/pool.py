"""The order in which the files of a split are converted: side by side in processes, or one after another."""

import multiprocessing
import shutil
import signal
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Optional

from tqdm import tqdm

from src.common.errors import UserError
from src.common.machine import check_shared_memory
from src.common.workers import init_conversion_worker
from src.config.data_places import is_url
from src.conversion.output import make_unfinished_folder, open_output, remove_leftovers
from src.conversion.parts import Job, Part, convert


def make_parts(split: str, jobs: list[Job], there: list[Optional[Part]], num_workers: int, total: Optional[int] = None,
               ) -> list[Job]:
    """Makes the parts of a split that are not there.

    `there` is what was made before, for each of `jobs`. `total` counts the documents of the split, for the bar; None
    where nobody knows. Returns the jobs that make up the split: where only the first N documents are asked for, those
    that hold them. Raises UserError, which says what went wrong with the first part that failed; parts that are
    finished stay.
    """
    if any(there):
        print(f'{split}: {sum(map(bool, there))} of {len(jobs)} parts were there before')
    max_docs = jobs[0].max_docs if jobs else None
    tqdm.monitor_interval = 0  # no thread, whose lock a fork could copy
    # no smoothing: parts come in batches, one of each worker; in a file of logs a line a minute
    with tqdm(desc=split, total=max_docs or total, initial=sum(part['documents'] for part in there if part),
              unit=' documents', unit_scale=True, smoothing=0, mininterval=0.1 if sys.stderr.isatty() else 60) as bar:
        if max_docs is not None:
            return _run_in_order(jobs, max_docs, bar)
        todo = [job for job, part in zip(jobs, there, strict=True) if part is None]
        if num_workers > 1 and len(todo) > 1:
            _run_in_processes(todo, num_workers, bar)
        else:
            for job in todo:
                bar.update(convert(job)['documents'])
    return jobs


def _run_in_processes(jobs: list[Job], num_workers: int, bar: tqdm) -> None:
    # A fork would copy the threads and locks of the clients of the hub and the object stores; a start takes 5 s.
    plain = sys.platform == 'linux' and not (is_url(jobs[0].file.path) or is_url(jobs[0].root))
    context = multiprocessing.get_context('fork' if plain else 'spawn')
    check_shared_memory(1 << 16, 'the queues of worker processes', '; or set --num_workers 1')
    temporary = make_unfinished_folder(Path(tempfile.gettempdir()), 'workers')
    pool = ProcessPoolExecutor(min(num_workers, len(jobs)), context, init_conversion_worker, (str(temporary),))
    try:
        on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is this process's alone
        try:
            futures = [pool.submit(convert, job) for job in jobs]
        finally:
            signal.signal(signal.SIGINT, on_interrupt)
        for future in as_completed(futures):
            bar.update(future.result()['documents'])
    except BrokenProcessPool:
        raise UserError('--num_workers: a worker process was killed, perhaps for want of memory; run the same command '
                        f'again, with fewer than {num_workers}: it goes on') from None
    finally:
        for process in list((pool._processes or {}).values()):  # else the parts under way would be finished first
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(temporary, ignore_errors=True)
        remove_leftovers(open_output(jobs[0].root))


def _run_in_order(jobs: list[Job], max_docs: int, bar: tqdm) -> list[Job]:
    """The first `max_docs` documents: how many a file has to give is known only when those before it are done."""
    taken = []
    for job in jobs:
        taken.append(job._replace(max_docs=max_docs))
        part = convert(taken[-1])
        bar.update(part['documents'])
        max_docs -= part['documents']
        if max_docs == 0:
            break
    return taken

"""Converts the files of a split, in several processes or one file after another."""

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


def make_parts(split: str, jobs: list[Job], finished: list[Optional[Part]], num_workers: int,
               total: Optional[int] = None) -> list[Job]:
    """Makes the parts of a split that are missing.

    `finished` has the finished part of each job, or None. `total` is the number of documents in the split, for the
    progress bar; None if it is not known. Returns the jobs that make up the split: with a limit of N documents, those
    that hold the first N. Raises UserError for the first part that failed; finished parts stay.
    """
    if any(finished):
        print(f'{split}: {sum(map(bool, finished))} of {len(jobs)} parts are already finished')
    max_docs = jobs[0].max_docs if jobs else None
    tqdm.monitor_interval = 0  # no monitor thread: a fork could copy its lock while it is held
    # No smoothing, because all workers finish a part at about the same time. In a log file: one line per minute.
    with tqdm(desc=split, total=max_docs or total, initial=sum(part['documents'] for part in finished if part),
              unit=' documents', unit_scale=True, smoothing=0, mininterval=0.1 if sys.stderr.isatty() else 60) as bar:
        if max_docs is not None:
            return _run_in_order(jobs, max_docs, bar)
        todo = [job for job, part in zip(jobs, finished, strict=True) if part is None]
        if num_workers > 1 and len(todo) > 1:
            _run_in_processes(todo, num_workers, bar)
        else:
            for job in todo:
                bar.update(convert(job)['documents'])
    return jobs


def _run_in_processes(jobs: list[Job], num_workers: int, bar: tqdm) -> None:
    # With a hub or an object store, a fork would copy the locks of their clients. To spawn a process takes 5 s.
    can_fork = sys.platform == 'linux' and not (is_url(jobs[0].file.path) or is_url(jobs[0].root))
    context = multiprocessing.get_context('fork' if can_fork else 'spawn')
    check_shared_memory(1 << 16, 'the queues of worker processes', '; or set --num_workers 1')
    temporary = make_unfinished_folder(Path(tempfile.gettempdir()), 'workers')
    pool = ProcessPoolExecutor(min(num_workers, len(jobs)), context, init_conversion_worker, (str(temporary),))
    try:
        on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers inherit it and ignore Ctrl-C
        try:
            futures = [pool.submit(convert, job) for job in jobs]
        finally:
            signal.signal(signal.SIGINT, on_interrupt)
        for future in as_completed(futures):
            bar.update(future.result()['documents'])
    except BrokenProcessPool:
        raise UserError('--num_workers: a worker process was killed, perhaps because memory ran out; run the same '
                        f'command again, with fewer than {num_workers} workers: it continues') from None
    finally:
        for process in list((pool._processes or {}).values()):  # or shutdown waits for their parts
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(temporary, ignore_errors=True)
        remove_leftovers(open_output(jobs[0].root))


def _run_in_order(jobs: list[Job], max_docs: int, bar: tqdm) -> list[Job]:
    """Converts the first `max_docs` documents, file by file: each file converts what those before it left over."""
    taken = []
    for job in jobs:
        taken.append(job._replace(max_docs=max_docs))
        part = convert(taken[-1])
        bar.update(part['documents'])
        max_docs -= part['documents']
        if max_docs == 0:
            break
    return taken

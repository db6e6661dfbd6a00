"""Callbacks that profile a run: torch's profiler, and records of GPU memory. Each start of a run has its own files."""

import logging
import os
import pickle
from pathlib import Path
from typing import Any, Optional

import torch
from composer import callbacks
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import format_name_with_dist, format_name_with_dist_and_time
from torch.cuda import _memory_viz
from torch.profiler import ProfilerAction

from src.common.errors import UserError

log = logging.getLogger(__name__)


def unused_folder(folder: str, run_name: str) -> str:
    """The folder for this start, before names such as `{run_name}` are filled in; ends in `.2`, `.3` if files exist."""
    name, start = folder, 1
    while any(path.is_file() for path in Path(format_name_with_dist(name, run_name)).rglob('*')):
        start += 1
        name = f'{folder.rstrip("/")}.{start}'
    return name


def new_folder(folder: str, run_name: str) -> Path:
    """Creates the folder for this start."""
    path = Path(format_name_with_dist(unused_folder(folder, run_name), run_name))
    path.mkdir(parents=True, exist_ok=True)
    return path


class MemorySnapshot(callbacks.MemorySnapshot):
    """Composer's MemorySnapshot, with a folder for each start."""

    def init(self, state: State, logger: Logger) -> None:
        # Absolute: Composer joins the path to itself, and only logs a line if the resulting path does not exist.
        self.folder = os.path.abspath(self.folder if self.overwrite else unused_folder(self.folder, state.run_name))
        super().init(state, logger)


class OOMObserver(Callback):
    """Records GPU allocations, and writes a snapshot of the memory when a GPU runs out of memory.

    Like Composer's OOMObserver without flame graphs, for which torch downloads a script from GitHub and runs it.

    Args:
        max_entries: Number of allocations that are kept.
        folder: The folder of the files; each start of a run has its own.
        filename: The beginning of the files' names.
    """

    def __init__(self, max_entries: int = 100000, folder: str = '{run_name}/oom_traces',
                 filename: str = 'rank{rank}_oom'):
        self.max_entries, self.folder, self.filename = max_entries, folder, filename

    def init(self, state: State, logger: Logger) -> None:
        folder = new_folder(self.folder, state.run_name)

        def observe(device: int, requested: int, allocated: int, free: int) -> None:
            name = folder / format_name_with_dist_and_time(self.filename, state.run_name, state.timestamp)
            try:
                snapshot: Any = torch.cuda.memory._snapshot()
                Path(f'{name}.pickle').write_bytes(pickle.dumps(snapshot))
                Path(f'{name}.trace.html').write_text(_memory_viz.trace_plot(snapshot), 'utf-8')
                Path(f'{name}.segment.html').write_text(_memory_viz.segment_plot(snapshot), 'utf-8')
                log.warning('callbacks.oom_observer: a snapshot of the memory is in %s.*', name)
            except Exception as e:  # no exception may reach the allocator
                log.warning('callbacks.oom_observer: cannot write %s: %s', name, e)

        torch.cuda.memory._record_memory_history(stacks='python', max_entries=self.max_entries)
        attach: Any = getattr(torch._C, '_cuda_attach_out_of_memory_observer')  # noqa: B009  (pyright knows none)
        attach(observe)


class Profiler(Callback):
    """Writes Chrome traces of torch's profiler, one for each rank and cycle, with ranges `forward`, `loss`, `backward`.

    Composer's own profiler is not used: it merges clocks that are decades apart, and loses the last batch of a trace.

    Args:
        folder: The folder of the traces; each start of a run has its own.
        skip_first: Batches before the first cycle, in each epoch or in the rest of an epoch that a resumed run has.
        wait, warmup, active: Batches of a cycle: not profiled, then profiled and thrown away, then kept.
        repeat: Number of cycles in each epoch; 0: until the epoch ends.
        record_shapes, profile_memory: Record the shapes of each operator's inputs; the memory that it takes and frees.
        with_stack: Record where in the code each operator was called; slow.
    """

    def __init__(self, folder: str = 'traces/{run_name}', skip_first: int = 10, wait: int = 0, warmup: int = 1,
                 active: int = 3, repeat: int = 1, record_shapes: bool = False, profile_memory: bool = False,
                 with_stack: bool = False):
        minimums = {'skip_first': (skip_first, 0), 'wait': (wait, 0), 'warmup': (warmup, 1), 'active': (active, 1),
                    'repeat': (repeat, 0)}
        for name, (value, lowest) in minimums.items():
            if value < lowest:
                raise UserError(f'{name}: {value} must be at least {lowest}')
        self.folder = folder
        self.action_at = torch.profiler.schedule(skip_first=skip_first, wait=wait, warmup=warmup, active=active,
                                                 repeat=repeat)
        self.options: Any = {'record_shapes': record_shapes, 'profile_memory': profile_memory, 'with_stack': with_stack}
        self.batch = 0  # in the epoch, or in the rest of an epoch that a resumed run has
        self.ranges: dict[str, torch.profiler.record_function] = {}
        self.profiler: Optional[torch.profiler.profile] = None

    def init(self, state: State, logger: Logger) -> None:
        folder = new_folder(self.folder, state.run_name)

        def write_trace(profiler: torch.profiler.profile) -> None:
            name = format_name_with_dist_and_time('rank{rank}.{batch}.pt.trace.json', state.run_name, state.timestamp)
            profiler.export_chrome_trace(str(folder / name))

        def schedule(step: int) -> ProfilerAction:
            action = self.action_at(self.batch)
            ends_epoch = state.dataloader_len == int(state.timestamp.batch_in_epoch) + 1
            return ProfilerAction.RECORD_AND_SAVE if action == ProfilerAction.RECORD and ends_epoch else action

        self.profiler = torch.profiler.profile(schedule=schedule, on_trace_ready=write_trace, with_flops=True,
                                               **self.options)
        self.profiler.start()

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        super().run_event(event, state, logger)
        name = event.canonical_name
        if name in ('forward', 'loss', 'backward') and event.is_before_event:
            self.ranges[name] = torch.profiler.record_function(name)
            self.ranges[name].__enter__()
        elif name in self.ranges and event.is_after_event:
            self.ranges.pop(name).__exit__(None, None, None)

    def epoch_start(self, state: State, logger: Logger) -> None:
        self.batch = 0

    def batch_end(self, state: State, logger: Logger) -> None:
        self.batch += 1
        assert self.profiler is not None
        self.profiler.step()

    def close(self, state: State, logger: Logger) -> None:
        if self.profiler is not None:  # Composer calls this once more as the process ends
            self.profiler.stop()
            self.profiler = None

"""What looks into a run: torch's profiler, and what records a GPU's memory. No start writes over another's files."""

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
    """The folder, as Composer spells it; with `.2`, `.3` where an earlier start has left its files."""
    name, start = folder, 1
    while any(path.is_file() for path in Path(format_name_with_dist(name, run_name)).rglob('*')):
        start += 1
        name = f'{folder.rstrip("/")}.{start}'
    return name


def new_folder(folder: str, run_name: str) -> Path:
    """Makes the folder of this start."""
    path = Path(format_name_with_dist(unused_folder(folder, run_name), run_name))
    path.mkdir(parents=True, exist_ok=True)
    return path


class MemorySnapshot(callbacks.MemorySnapshot):
    """Composer's, with a folder for each start."""

    def init(self, state: State, logger: Logger) -> None:
        # Absolute: Composer joins it to itself, and says no more than a line in the log when that is not there.
        self.folder = os.path.abspath(self.folder if self.overwrite else unused_folder(self.folder, state.run_name))
        super().init(state, logger)


class OOMObserver(Callback):
    """Records allocations, and what lay where as a GPU ran out of memory.

    As Composer's, without the flame graphs, for which torch fetches a script from GitHub and runs it.

    Args:
        max_entries: Allocations that are remembered.
        folder: Where the files go; each start of a run has one of its own.
        filename: What their names begin with.
    """

    def __init__(self, max_entries: int = 100000, folder: str = '{run_name}/oom_traces',
                 filename: str = 'rank{rank}_oom'):
        self.max_entries, self.folder, self.filename = max_entries, folder, filename

    def init(self, state: State, logger: Logger) -> None:
        folder = new_folder(self.folder, state.run_name)

        def observe(device: int, asked: int, allocated: int, free: int) -> None:
            name = folder / format_name_with_dist_and_time(self.filename, state.run_name, state.timestamp)
            try:
                snapshot: Any = torch.cuda.memory._snapshot()
                Path(f'{name}.pickle').write_bytes(pickle.dumps(snapshot))
                Path(f'{name}.trace.html').write_text(_memory_viz.trace_plot(snapshot), 'utf-8')
                Path(f'{name}.segment.html').write_text(_memory_viz.segment_plot(snapshot), 'utf-8')
                log.warning('callbacks.oom_observer: %s.* have what lay in memory', name)
            except Exception as e:  # nothing may pass into the allocator
                log.warning('callbacks.oom_observer: %s: %s', name, e)

        torch.cuda.memory._record_memory_history(stacks='python', max_entries=self.max_entries)
        attach: Any = getattr(torch._C, '_cuda_attach_out_of_memory_observer')  # noqa: B009  (pyright knows none)
        attach(observe)


class Profiler(Callback):
    """Writes torch's Chrome traces, one a rank and cycle, with `forward`, `loss` and `backward` in them.

    Composer's profiler is left out: it merges clocks that are decades apart, and drops the batch that it saves after.

    Args:
        folder: Where they go; each start of a run has one of its own.
        skip_first: Batches of each epoch, or of what a resumed run has left of one, before the first cycle.
        wait, warmup, active: Batches of a cycle: not looked at, then profiled and thrown away, then kept.
        repeat: Cycles in each epoch; 0: until it ends.
        record_shapes, profile_memory: Of each operator's inputs; what each operator takes and gives back.
        with_stack: Where in the code each was called; slow.
    """

    def __init__(self, folder: str = 'traces/{run_name}', skip_first: int = 10, wait: int = 0, warmup: int = 1,
                 active: int = 3, repeat: int = 1, record_shapes: bool = False, profile_memory: bool = False,
                 with_stack: bool = False):
        least = {'skip_first': (skip_first, 0), 'wait': (wait, 0), 'warmup': (warmup, 1), 'active': (active, 1),
                 'repeat': (repeat, 0)}
        for name, (value, lowest) in least.items():
            if value < lowest:
                raise UserError(f'{name}: {value} must be at least {lowest}')
        self.folder = folder
        self.action_at = torch.profiler.schedule(skip_first=skip_first, wait=wait, warmup=warmup, active=active,
                                                 repeat=repeat)
        self.options: Any = {'record_shapes': record_shapes, 'profile_memory': profile_memory, 'with_stack': with_stack}
        self.batch = 0  # of the epoch, or of what a resumed run has left of it
        self.ranges: dict[str, torch.profiler.record_function] = {}
        self.profiler: Optional[torch.profiler.profile] = None

    def init(self, state: State, logger: Logger) -> None:
        folder = new_folder(self.folder, state.run_name)

        def write(profiler: torch.profiler.profile) -> None:
            name = format_name_with_dist_and_time('rank{rank}.{batch}.pt.trace.json', state.run_name, state.timestamp)
            profiler.export_chrome_trace(str(folder / name))

        def action(step: int) -> ProfilerAction:
            found = self.action_at(self.batch)
            ends_epoch = state.dataloader_len == int(state.timestamp.batch_in_epoch) + 1
            return ProfilerAction.RECORD_AND_SAVE if found == ProfilerAction.RECORD and ends_epoch else found

        self.profiler = torch.profiler.profile(schedule=action, on_trace_ready=write, with_flops=True, **self.options)
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

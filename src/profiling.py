"""Callbacks that look into a run: Composer's profiler, and what records a GPU's memory. No start writes over another's files."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Optional

import composer.profiler
import torch
from composer import callbacks
from composer.core import Event, State
from composer.loggers import Logger
from composer.utils import format_name_with_dist


def unused(folder: str, run_name: str) -> str:
    """The folder, as Composer spells it; with `.2`, `.3` where an earlier start has left its files."""
    name, start = folder, 1
    while any(path.is_file() for path in Path(format_name_with_dist(name, run_name)).rglob('*')):
        start += 1
        name = f'{folder.rstrip("/")}.{start}'
    return name


class MemorySnapshot(callbacks.MemorySnapshot):
    """Composer's, with a folder for each start."""

    def init(self, state: State, logger: Logger) -> None:
        self.folder = self.folder if self.overwrite else unused(self.folder, state.run_name)
        super().init(state, logger)


class OOMObserver(callbacks.OOMObserver):
    """Composer's, with a folder for each start."""

    def __init__(self, max_entries: int = 100000, folder: str = '{run_name}/oom_traces', filename: str = 'rank{rank}_oom',
                 remote_file_name: Optional[str] = '{run_name}/oom_traces/rank{rank}_oom', overwrite: bool = False) -> None:
        super().__init__(max_entries, folder, filename, remote_file_name, overwrite)  # not memory_snapshot's folder

    def init(self, state: State, logger: Logger) -> None:
        self.folder = self.folder if self.overwrite else unused(self.folder, state.run_name)
        super().init(state, logger)


class TorchProfiler(composer.profiler.TorchProfiler):
    """Composer's, without the metadata that torch would warn of after each batch that is not profiled."""

    def batch_end(self, state: State, logger: Logger) -> None:
        assert self.profiler
        self.profiler.step()


class NoMarker(nullcontext):
    """In place of Composer's marks of events, which nothing writes."""

    def start(self) -> None:
        pass

    def finish(self) -> None:
        pass


class Profiler(composer.profiler.Profiler):
    """Composer's, which writes torch's Chrome traces, one a rank and cycle, with `forward`, `loss` and `backward` in them.

    Composer's own handler is left out: it merges clocks that are decades apart, and drops the batch that it saves after.

    Args:
        folder: Where they go; each start of a run has one of its own.
        skip_first: Batches of each epoch, or of what a resumed run has left of one, before the first cycle.
        wait: Batches of a cycle that are not looked at.
        warmup: Batches after them that are profiled and thrown away.
        active: Batches after those that are kept.
        repeat: Cycles in each epoch; 0: until it ends.
        record_shapes: Of each operator's inputs.
        profile_memory: What each operator takes and gives back.
        with_stack: Where in the code each was called; slow.
    """

    def __init__(self, folder: str = 'traces/{run_name}', skip_first: int = 10, wait: int = 0, warmup: int = 1, active: int = 3,
                 repeat: int = 1, record_shapes: bool = False, profile_memory: bool = False, with_stack: bool = False):
        counts = {'skip_first': skip_first, 'wait': wait, 'warmup': warmup, 'active': active, 'repeat': repeat}
        for name, value in counts.items():
            if value < (name in ('warmup', 'active')):
                raise ValueError(f'{name}: {value} must be at least {int(name in ("warmup", "active"))}')
        super().__init__(composer.profiler.cyclic_schedule(**counts), [], sys_prof_cpu=False)
        self.torch_profiler = TorchProfiler(folder, remote_file_name=None, record_shapes=record_shapes,
                                            profile_memory=profile_memory, with_stack=with_stack)
        self._callbacks = [self.torch_profiler]
        self._ranges: dict[str, torch.profiler.record_function] = {}

    def marker(self, *args: Any, **kwargs: Any) -> Any:
        return NoMarker()  # Composer's own fail where a resumed run drops batches that it has seen

    def init(self, state: State, logger: Logger) -> None:
        self.torch_profiler.folder = unused(self.torch_profiler.folder, state.run_name)

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        super().run_event(event, state, logger)
        name = event.canonical_name
        if name in ('forward', 'loss', 'backward') and event.is_before_event:
            self._ranges[name] = torch.profiler.record_function(name)
            self._ranges[name].__enter__()
        elif name in self._ranges and event.is_after_event:
            self._ranges.pop(name).__exit__(None, None, None)

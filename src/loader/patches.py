"""Changes the streaming library itself, for the whole process: the order of samples, and shared memory."""

import mmap
import os
from functools import cache
from multiprocessing.shared_memory import SharedMemory as Block
from multiprocessing.util import Finalize
from typing import Optional

from streaming.base.batching import batching_methods
from streaming.base.partition import algos
from streaming.base.shared import SharedMemory, memory, prefix

from src.common.errors import DISK_FULL
from src.common.machine import check_shared_memory
from src.loader.sample_order import deal_stratified_batches, deal_whole_batches
from src.loader.shared_memory import remove_own_locks


@cache
def patch_streaming() -> None:
    """Replaces streaming's order of samples and its shared memory by the kit's. A second call does nothing."""
    algos[deal_whole_batches.__name__] = deal_whole_batches
    batching_methods['stratified'] = deal_stratified_batches
    prefix.SharedMemory = _attach_briefly  # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue]
    memory.BuiltinSharedMemory = _AllocatedBlock  # pyright: ignore[reportPrivateImportUsage]
    # The negative priority makes this run after streaming has removed the blocks, and after the end of the DataLoader's
    # workers, which create lock files again. A rank that still uses the blocks removes the lock files later.
    Finalize(None, remove_own_locks, exitpriority=-1)


def _attach_briefly(name: str, create: bool, size: int = 0) -> SharedMemory:
    """Opens a block for streaming's search for a free prefix, without keeping the block open.

    Streaming keeps each block that it looks at open until the process ends. The blocks of a killed job would then
    seem to be in use.
    """
    return SharedMemory(name, create, size, auto_cleanup=create)


class _AllocatedBlock(Block):
    """A block that gets all its pages at creation; else a write to a full `/dev/shm` kills the process by SIGBUS."""

    def __init__(self, name: Optional[str] = None, create: bool = False, size: int = 0) -> None:
        super().__init__(name, create, size)
        if not create:
            return
        try:
            os.posix_fallocate(self._fd, 0, size)  # pyright: ignore[reportAttributeAccessIssue]
        except OSError as e:
            self.close()
            self.unlink()
            if e.errno in DISK_FULL:
                check_shared_memory(max(size, mmap.PAGESIZE), "the loader's state and the order of the samples")
            raise

"""What is changed in streaming itself, for the whole process."""

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
    """Puts the kit's order of samples and its shared memory into streaming. Does nothing the second time."""
    algos[deal_whole_batches.__name__] = deal_whole_batches
    batching_methods['stratified'] = deal_stratified_batches
    prefix.SharedMemory = _attach_briefly  # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue]
    memory.BuiltinSharedMemory = _AllocatedBlock  # pyright: ignore[reportPrivateImportUsage]
    # With a negative priority this runs after streaming has removed the blocks and after the DataLoader's workers,
    # which make lock files anew, have ended. A rank that ends while another holds the blocks leaves them to it.
    Finalize(None, remove_own_locks, exitpriority=-1)


def _attach_briefly(name: str, create: bool, size: int = 0) -> SharedMemory:
    """For the search for a free prefix: streaming holds each block of other jobs that it looks at until the end.

    A killed job's blocks would then look as if they were in use.
    """
    return SharedMemory(name, create, size, auto_cleanup=create)


class _AllocatedBlock(Block):
    """A block whose pages exist from its creation on: else a write to a full `/dev/shm` ends the process by SIGBUS."""

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
                check_shared_memory(max(size, mmap.PAGESIZE), 'the places and the order of the samples')
            raise

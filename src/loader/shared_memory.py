"""What streaming leaves on a machine: shared-memory blocks and lock files, removed here once nobody uses them.

Streaming names both `NNNNNN_name`, with one six-digit prefix for each dataset that is open on the machine: blocks in
`/dev/shm`, lock files in the temporary folder. It removes the blocks when a process ends normally, the lock files
never. After SIGKILL both stay, and the next run would fail with `FileExistsError` or `Reused local directory`.
Streaming's own `clean_stale_shared_memory()` also removes the blocks of jobs that are still running; this removes none
of those.
"""

import fcntl
import gc
import os
import re
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import gettempdir
from weakref import WeakKeyDictionary

from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, SHM_TO_CLEAN
from streaming.base.distributed import get_local_rank, get_local_world_size, get_world_size
from torch import distributed as dist
from torch.utils.data import DataLoader

from src.common.machine import SHARED_MEMORY as BLOCKS
from src.common.machine import check_shared_memory, megabytes

LOCKS = (BARRIER_FILELOCK, CACHE_FILELOCK)
NAME = re.compile(rf'(\d{{6}})_(?:{"|".join([*SHM_TO_CLEAN, *LOCKS])})')

_opened: set[str] = set()  # prefixes of the datasets of this process
_needs: WeakKeyDictionary[DataLoader, int] = WeakKeyDictionary()  # bytes that the loaders of this process take


def _files(folder: Path) -> dict[str, list[Path]]:
    """This user's files of streaming in a folder, by prefix."""
    found = defaultdict(list)
    for entry in os.scandir(folder):
        match = NAME.fullmatch(entry.name)
        try:
            if match and entry.stat(follow_symlinks=False).st_uid == os.getuid():
                found[match[1]].append(Path(entry.path))
        except FileNotFoundError:  # removed since it was listed
            continue
    return found


def _is_unused(path: Path) -> bool:
    """Asks the kernel, which also knows the processes of other containers that share `/dev/shm`.

    A write lease is refused while anyone else has the file open or mapped: from its creation on, so that a block whose
    owner is about to map it is safe. See fcntl(2), "Leases".
    """
    try:
        with path.open('rb') as f:
            fcntl.fcntl(f, fcntl.F_SETSIG, signal.SIGURG)  # the default, SIGIO, would end this process
            fcntl.fcntl(f, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    except OSError:  # a kernel without leases
        return not _is_mapped(path)
    return True


def _is_mapped(path: Path) -> bool:
    """Whether any process maps the file, as far as this user may look."""
    for maps in Path('/proc').glob('[0-9]*/maps'):
        try:
            # To the end of the line: a block that was removed is listed as "(deleted)".
            if f'{path}\n' in maps.read_text(errors='replace'):
                return True
        except (PermissionError, FileNotFoundError, ProcessLookupError):  # another user's, or it has just ended
            continue
    return False


def remove_stale() -> list[str]:
    """Removes this user's blocks and lock files whose processes are gone, and returns their names.

    The blocks of a prefix are stale when no process has one open or mapped, lock files when no block has their prefix.
    Does nothing where there is no `/dev/shm`.
    """
    if not BLOCKS.is_dir():
        return []
    locks, blocks = _files(Path(gettempdir())), _files(BLOCKS)
    stale = {number for number, paths in blocks.items() if all(map(_is_unused, paths))}
    removed = [path for number in stale for path in blocks[number]]
    removed += [path for number, paths in locks.items() if number in stale or not any(BLOCKS.glob(f'{number}_*'))
                for path in paths]
    for path in removed:
        path.unlink(missing_ok=True)
    return [path.name for path in removed]


@contextmanager
def _locked(folder: Path, seconds: float = 60) -> Iterator[None]:
    """Holds the folder's lock, or goes on without it: two jobs on the same two nodes could wait for each other."""
    fd = os.open(folder, os.O_RDONLY)
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
        yield
    finally:
        os.close(fd)


@contextmanager
def opening_a_dataset() -> Iterator[None]:
    """What a StreamingDataset must be created in: stale files are gone, and no other job of this kit takes its prefix.

    Each node's first rank cleans up and holds a lock on `/dev/shm`; the other ranks wait until it has both. Streaming
    looks for a free prefix and takes it in two steps, so of two jobs that start at once one could fail with
    `FileExistsError`.
    """
    gc.collect()  # a dataset of this process that nothing refers to any more gives up its `local`
    several = dist.is_available() and dist.is_initialized()
    with ExitStack() as stack:
        if get_local_rank() == 0 and (several or get_world_size() == 1):
            stack.enter_context(_locked(BLOCKS if BLOCKS.is_dir() else Path(gettempdir())))
            remove_stale()
        if several:
            dist.barrier()
        yield


def check_loader(setting: str, loader: DataLoader, batch_bytes: int, order_bytes: int = 0) -> None:
    """Refuses a loader that does not fit into shared memory together with the other loaders of this process.

    The loader workers of all ranks of a machine hand over their batches, of `batch_bytes` each, through its shared
    memory. The order of the samples of an epoch, of `order_bytes`, lies there too. `setting` is `train_loader` or
    `eval_loader`, and the loader has read nothing yet. Raises UserError where there is too little room.
    """
    n_batches = loader.num_workers * (loader.prefetch_factor or 0) * get_local_world_size()
    need = n_batches * batch_bytes + order_bytes
    what = (f'the batches of loader workers ({setting}: {n_batches} of {megabytes(batch_bytes)}) and the order of the '
            'samples')
    otherwise = f'; or set a smaller {setting}.num_workers' if loader.num_workers else ''
    check_shared_memory(need + sum(_needs.values()), what, otherwise)
    _needs[loader] = need


def remove_locks_at_exit(number: int) -> None:
    """Has the lock files of an open dataset, by its prefix, removed at the end of this process."""
    _opened.add(f'{number:06}')


def remove_own_locks() -> None:
    """Removes the lock files of this process's datasets, but those that another process still uses."""
    for number in _opened:
        if not any(BLOCKS.glob(f'{number}_*')):
            for name in LOCKS:
                Path(gettempdir(), f'{number}_{name}').unlink(missing_ok=True)

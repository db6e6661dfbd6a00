"""Removes the shared-memory blocks and lock files that streaming leaves on a machine, once no process uses them.

Streaming puts blocks into `/dev/shm` and lock files into the temporary folder. Their names are `NNNNNN_name`; each open
dataset of the machine has a prefix of six digits. Streaming removes the blocks when a process ends normally, and never
removes the lock files. After SIGKILL both stay, and the next run would fail with `FileExistsError` or `Reused local
directory`. Streaming's `clean_stale_shared_memory()` is no help: it also removes the blocks of running jobs.
"""

import fcntl
import gc
import os
import re
import signal
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import gettempdir
from weakref import WeakKeyDictionary

from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, SHM_TO_CLEAN
from streaming.base.distributed import get_local_rank, get_local_world_size, get_world_size
from streaming.base.shared.prefix import _unpack_locals
from torch import distributed as dist
from torch.utils.data import DataLoader

from src.common.machine import SHARED_MEMORY as BLOCKS
from src.common.machine import check_shared_memory, megabytes

LOCKS = (BARRIER_FILELOCK, CACHE_FILELOCK)
NAME = re.compile(rf'(\d{{6}})_(?:{"|".join([*SHM_TO_CLEAN, *LOCKS])})')

_opened_prefixes: set[str] = set()  # of the datasets of this process
_needed_bytes: WeakKeyDictionary[DataLoader, int] = WeakKeyDictionary()  # of shared memory, by loader of this process


def _streaming_files(folder: Path) -> dict[str, list[Path]]:
    """Streaming's files in a folder, by prefix; only those of this user."""
    found = defaultdict(list)
    for entry in os.scandir(folder):
        match = NAME.fullmatch(entry.name)
        try:
            if match and entry.stat(follow_symlinks=False).st_uid == os.getuid():
                found[match[1]].append(Path(entry.path))
        except FileNotFoundError:  # another process has removed it meanwhile
            continue
    return found


def _is_unused(path: Path) -> bool:
    """Whether no process has the file open or mapped, also in other containers that share `/dev/shm`.

    The kernel refuses a write lease while another process has the file open or mapped, which begins with the creation
    of the file. So a block that its owner is about to map counts as used. See fcntl(2), "Leases".
    """
    try:
        with path.open('rb') as f:
            fcntl.fcntl(f, fcntl.F_SETSIG, signal.SIGURG)  # the default signal, SIGIO, would end this process
            fcntl.fcntl(f, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    except OSError:  # a kernel without leases
        return not _is_mapped(path)
    return True


def _is_mapped(path: Path) -> bool:
    """Whether any process maps the file, among the processes that this user may look into."""
    for maps in Path('/proc').glob('[0-9]*/maps'):
        try:
            # With the end of the line: the path of a removed block is followed by "(deleted)".
            if f'{path}\n' in maps.read_text(errors='replace'):
                return True
        except (PermissionError, FileNotFoundError, ProcessLookupError):  # of another user, or ended meanwhile
            continue
    return False


def _remove_lock(path: Path) -> bool:
    """Removes a lock file that no process holds; returns whether it did.

    Jobs with another `/dev/shm`, in other containers or on other nodes, may have the same temporary folder. So this
    process holds the lock while it removes the file: whoever waits for the lock then finds the file gone, and makes a
    new one. Otherwise one process could hold the old file and another the new one, and both would count at once in a
    barrier of streaming, which then waits forever.
    """
    try:
        with path.open('r+b') as f:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(f.fileno()), path.stat()):  # another process was faster; keep the new file
                return False
            path.unlink()
    except OSError:  # held, removed meanwhile, or on a disk without such locks, where the file itself is the lock
        return False
    return True


def remove_stale() -> list[str]:
    """Removes this user's blocks and lock files whose processes are gone, and returns their names.

    The blocks of a prefix are stale if no process has any of them open or mapped. Lock files are stale if no block has
    their prefix and no process holds them. Does nothing where there is no `/dev/shm`.
    """
    if not BLOCKS.is_dir():
        return []
    locks, blocks = _streaming_files(Path(gettempdir())), _streaming_files(BLOCKS)
    stale = {prefix for prefix, paths in blocks.items() if all(map(_is_unused, paths))}
    with_blocks = {name.partition('_')[0] for name in os.listdir(BLOCKS)} - stale  # also those of other users
    removed = [path for prefix in stale for path in blocks[prefix]]
    for path in removed:
        path.unlink(missing_ok=True)
    unused = [path for prefix, paths in locks.items() if prefix not in with_blocks for path in paths]
    return [path.name for path in [*removed, *filter(_remove_lock, unused)]]


@contextmanager
def _locked(folder: Path, seconds: float = 60) -> Iterator[None]:
    """Locks a folder; after `seconds` goes on without the lock, as two jobs on two nodes could block each other."""
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


def _are_held(folders: Iterable[str]) -> bool:
    """Whether a dataset, maybe of this process, has not released one of these folders."""
    if not BLOCKS.is_dir():
        return bool(_opened_prefixes)
    for block in BLOCKS.glob('*_locals'):
        with suppress(OSError, ValueError, IndexError):  # of another user, removed meanwhile, or not filled yet
            if not {*_unpack_locals(block.read_bytes())[0]}.isdisjoint(folders):
                return True
    return False


@contextmanager
def opening_a_dataset(folders: Sequence[str]) -> Iterator[None]:
    """Context in which a StreamingDataset must be created: removes stale files, and keeps other jobs from its prefix.

    `folders` are those that the dataset fills, as absolute paths. Streaming gives a folder to one dataset at a time.

    The first rank of each node removes the files and holds a lock on `/dev/shm`; the other ranks wait for both.
    Streaming looks for a free prefix in one step and takes it in another. Without the lock, one of two jobs that start
    at the same time could fail with `FileExistsError`.
    """
    if _are_held(folders):
        gc.collect()  # a dataset that nothing refers to any more must release its `local`
    has_process_group = dist.is_available() and dist.is_initialized()
    with ExitStack() as stack:
        if get_local_rank() == 0 and (has_process_group or get_world_size() == 1):
            stack.enter_context(_locked(BLOCKS if BLOCKS.is_dir() else Path(gettempdir())))
            remove_stale()
        if has_process_group:
            dist.barrier()
        yield


def check_loader(setting: str, loader: DataLoader, batch_bytes: int, order_bytes: int = 0) -> None:
    """Raises UserError if a loader and the other loaders of this process do not fit into shared memory.

    The loader workers of all ranks of a machine pass their batches, of `batch_bytes` each, through shared memory. The
    order of the samples of an epoch lies there too, and takes `order_bytes`. `setting` is `train_loader` or
    `eval_loader`. The loader must not have read anything yet.
    """
    n_batches = loader.num_workers * (loader.prefetch_factor or 0) * get_local_world_size()
    n_bytes = n_batches * batch_bytes + order_bytes
    contents = (f'the batches of loader workers ({setting}: {n_batches} of {megabytes(batch_bytes)}) and the order of '
                'the samples')
    otherwise = f'; or set a smaller {setting}.num_workers' if loader.num_workers else ''
    check_shared_memory(n_bytes + sum(_needed_bytes.values()), contents, otherwise)
    _needed_bytes[loader] = n_bytes


def remove_locks_at_exit(prefix: int) -> None:
    """Makes this process remove the lock files of an open dataset, by its prefix, when the process ends."""
    _opened_prefixes.add(f'{prefix:06}')


def remove_own_locks() -> None:
    """Removes the lock files of this process's datasets, except those that another process still uses."""
    for prefix in _opened_prefixes:
        if not any(BLOCKS.glob(f'{prefix}_*')):
            for name in LOCKS:
                _remove_lock(Path(gettempdir(), f'{prefix}_{name}'))

"""The steps of a save: files on the disk for good, then in the object store, and the manifest as the last of them.

src/checkpoints/writer.py says when a run saves, and where.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from composer.utils import dist, get_device
from torch.distributed.checkpoint.api import CheckpointException

from src.checkpoints.manifest import UNFINISHED, Manifest
from src.checkpoints.safe_reading import root_cause
from src.common.errors import UserError, first_line
from src.common.storage import Folder, LocalFolder, RemoteFolder
from src.common.workers import run_in_background


@contextmanager
def explain_write_errors(name: str, place: str) -> Iterator[None]:
    """Says in one message that a disk is full, or cannot be written."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as e:
        cause = root_cause(e)
        cause = cause.__context__ or cause  # torch's writer fails once more as it closes the file
        if not isinstance(cause, OSError) and 'inline_container' not in str(cause):
            raise
        raise UserError(f'save_folder: cannot write {name} to {place}: {first_line(cause)}; what was saved before is '
                        'untouched') from e


class UnfinishedSave:
    """A save that is not whole yet: every rank takes the same steps, each in the background.

    A step begins once every rank is through with the one before. No rank waits in a collective for another's upload,
    because `advance` asks and goes on.
    """

    def __init__(self, manifest: Manifest, place: str, steps: list[Callable[[], None]]):
        self.manifest, self.place, self.steps = manifest, place, steps
        self.running = run_in_background(steps.pop(0))
        self.is_whole = False

    def advance(self) -> bool:
        """Begins the next step if all ranks are ready for it; returns whether they were. Every rank has to call it."""
        done = get_device(None).tensor_to_device(torch.tensor(int(self.running.done())))
        dist.all_reduce(done, reduce_operation='MIN')
        if not done.item():
            return False
        with explain_write_errors(self.manifest.name, self.place):
            self.running.result()
        if self.steps:
            self.running = run_in_background(self.steps.pop(0))
        else:
            self.is_whole = True
        return True


def begin_save(name: str, folder: Folder, local: str) -> None:
    """Marks this step as unfinished and voids an old manifest: a crash now leaves nothing that looks whole.

    All ranks have to call it.
    """
    if dist.get_local_rank() == 0:  # it may have been written by more ranks
        shutil.rmtree(Path(local, name), ignore_errors=True)
    if dist.get_global_rank() == 0:
        with explain_write_errors(name, str(folder)):
            folder.write(f'{name}{UNFINISHED}', '')
            if folder.size(f'{name}.json') >= 0:  # of a save that has lost a file since
                folder.write(f'{name}.json', '')
    dist.barrier()


def flush_to_disk(written: str, sharded: bool) -> list[Path]:
    """The files of this rank in a checkpoint that Composer has just written; they are on the disk for good."""
    files = [Path(written)]
    if sharded:
        folder, rank = files[0].parent, dist.get_global_rank()
        files = [*folder.glob(f'__{rank}_*'), *([folder / '.metadata'] if rank == 0 else [])]
    for file in files:
        with file.open('rb') as f:
            os.fsync(f.fileno())
    return files


def upload(files: list[str], folder: RemoteFolder, local: str) -> None:
    """Moves files of the local folder into the object store."""
    for file in files:
        folder.upload(file, Path(local, file))
        Path(local, file).unlink()


def check_shared(folder: LocalFolder) -> None:
    """Refuses a folder that the nodes do not share: it would hold what no later run can load. On all ranks."""
    probe = [f'.probe-{os.getpid()}-{time.time_ns()}']
    dist.broadcast_object_list(probe)
    if dist.get_global_rank() == 0:
        folder.write(probe[0], '')
    dist.barrier()
    deadline = time.monotonic() + 10  # a network file system may be slow to show it
    while not (seen := folder.size(probe[0]) >= 0) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = sorted({node for node, sees in dist.all_gather_object((dist.get_node_rank(), seen)) if not sees})
    if dist.get_global_rank() == 0:
        folder.delete(probe)
    if blind:
        raise UserError(f'save_folder: {folder} on node {", ".join(map(str, blind))} is not the folder of node 0; '
                        'name one that all nodes share, or an object store such as s3://')

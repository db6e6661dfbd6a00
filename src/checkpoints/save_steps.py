"""The steps of a save: write the files to the disk, upload them to an object store, and write the manifest last.

src/checkpoints/writer.py decides when and where a run saves.
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
def explain_write_errors(name: str, folder: str) -> Iterator[None]:
    """Raises a UserError that says why the checkpoint `name` cannot be written, such as a full disk."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as e:
        cause = root_cause(e)
        cause = cause.__context__ or cause  # torch's writer fails a second time when it closes the file
        if not isinstance(cause, OSError) and 'inline_container' not in str(cause):
            raise
        raise UserError(f'save_folder: cannot write {name} to {folder}: {first_line(cause)}; earlier checkpoints are '
                        'untouched') from e


class UnfinishedSave:
    """A save in progress: every rank runs the same steps, each in a background thread.

    A step begins when every rank has finished the step before. Training does not wait for the uploads of other ranks,
    because `advance` only checks whether they are done.
    """

    def __init__(self, manifest: Manifest, folder: str, steps: list[Callable[[], None]]):
        self.manifest, self.folder, self.steps = manifest, folder, steps
        self.running = run_in_background(steps.pop(0))
        self.is_whole = False

    def advance(self) -> bool:
        """Begins the next step if all ranks have finished the last one; returns whether they have. On all ranks."""
        done = get_device(None).tensor_to_device(torch.tensor(int(self.running.done())))
        dist.all_reduce(done, reduce_operation='MIN')
        if not done.item():
            return False
        with explain_write_errors(self.manifest.name, self.folder):
            self.running.result()
        if self.steps:
            self.running = run_in_background(self.steps.pop(0))
        else:
            self.is_whole = True
        return True


def begin_save(name: str, folder: Folder, local: str) -> None:
    """Marks the checkpoint as unfinished and empties an old manifest, so that a crash leaves nothing that looks whole.

    Call on every rank.
    """
    if dist.get_local_rank() == 0:  # an earlier save may have files of more ranks
        shutil.rmtree(Path(local, name), ignore_errors=True)
    if dist.get_global_rank() == 0:
        with explain_write_errors(name, str(folder)):
            folder.write(f'{name}{UNFINISHED}', '')
            if folder.size(f'{name}.json') >= 0:  # of an earlier save that has lost a file
                folder.write(f'{name}.json', '')
    dist.barrier()


def flush_to_disk(written: str, sharded: bool) -> list[Path]:
    """Flushes the files that this rank has just written for a checkpoint to the disk, and returns them."""
    files = [Path(written)]
    if sharded:
        folder, rank = files[0].parent, dist.get_global_rank()
        files = [*folder.glob(f'__{rank}_*'), *([folder / '.metadata'] if rank == 0 else [])]
    for file in files:
        with file.open('rb') as f:
            os.fsync(f.fileno())
    return files


def upload(files: list[str], folder: RemoteFolder, local: str) -> None:
    """Moves files from the local folder to the object store."""
    for file in files:
        folder.upload(file, Path(local, file))
        Path(local, file).unlink()


def check_shared(folder: LocalFolder) -> None:
    """Raises UserError if the nodes do not share the folder: no run could load what they save. On all ranks."""
    probe = [f'.probe-{os.getpid()}-{time.time_ns()}']
    dist.broadcast_object_list(probe)
    if dist.get_global_rank() == 0:
        folder.write(probe[0], '')
    dist.barrier()
    deadline = time.monotonic() + 10  # a network file system may show new files late
    while not (is_visible := folder.size(probe[0]) >= 0) and time.monotonic() < deadline:
        time.sleep(0.2)
    visible = dist.all_gather_object((dist.get_node_rank(), is_visible))
    apart = sorted({node for node, sees_probe in visible if not sees_probe})
    if dist.get_global_rank() == 0:
        folder.delete(probe)
    if apart:
        raise UserError(f'save_folder: {folder} on node {", ".join(map(str, apart))} is not the folder of node 0; '
                        'name one that all nodes share, or an object store such as s3://')

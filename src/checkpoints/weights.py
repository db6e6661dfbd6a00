"""The weights out of any checkpoint of the kit, without running code that it may hold.

Full or sharded, saved by any number of ranks, on a disk or in an object store.
"""

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from composer.utils import dist, get_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from src.checkpoints.manifest import Manifest
from src.checkpoints.safe_reading import explain_read_errors, extract_weights, forbid_code
from src.checkpoints.start import Start, explain_unreachable, start_from_path
from src.common.storage import open_folder

WEIGHTS = 'state.model.'  # the prefix of the weights' names in a sharded checkpoint
AS_WEIGHTS = 'as the weights of a checkpoint'


@contextmanager
def local_copy(start: Start, name: str = '') -> Iterator[str]:
    """Where a checkpoint lies on this node's disk, which may be a copy. Every rank of a process group has to call it.

    With a `name` that file alone of a sharded checkpoint is there for sure.
    """
    assert start.path
    if '://' not in start.path:
        yield start.path
        return
    with tempfile.TemporaryDirectory() as temp:
        ranks = dist.is_initialized()  # else this is one process, whatever a launcher's variables say
        folders = dist.all_gather_object(temp) if ranks else [temp]
        local = os.path.join(folders[dist.get_global_rank() - dist.get_local_rank() if ranks else 0], 'checkpoint')
        if not ranks or dist.get_local_rank() == 0:
            with explain_unreachable(start.setting, start.path):
                _download(start.path, start.sharded, name, local)
        if ranks:
            with dist.local_rank_zero_download_and_wait(local):  # a download may take longer than a barrier waits
                dist.barrier()
        yield local
        if ranks:
            dist.barrier()


def _download(path: str, sharded: bool, name: str, local: str) -> None:
    if not sharded:
        get_file(path, local)
        return
    part, folder = f'{local}.part', open_folder(path)
    os.mkdir(part)
    for file in [name] if name else folder.names():
        get_file(folder.uri(file), os.path.join(part, file))
    os.rename(part, local)


def _described(local: str) -> dict[str, Any]:
    """What a sharded checkpoint says of its weights, by name."""
    with forbid_code():
        there = FileSystemReader(local).read_metadata().state_dict_metadata
    return {key.removeprefix(WEIGHTS): part for key, part in there.items() if key.startswith(WEIGHTS)}


def shapes_in_shards(start: Start) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights in a sharded checkpoint. Every rank has to call it."""
    with local_copy(start, '.metadata') as local:
        return {name: tuple(getattr(part, 'size', ())) for name, part in _described(local).items()}


def read_full_checkpoint(local: str, start: Start) -> dict[str, Any]:
    """The model's state dict out of a full checkpoint: tensors on the CPU, mapped from the file, which they outlive."""
    with explain_read_errors(start, AS_WEIGHTS):
        return extract_weights(torch.load(local, map_location='cpu', weights_only=True, mmap=True), start)


def read_sharded(local: str, start: Start) -> dict[str, Tensor]:
    """The model's state dict out of a sharded checkpoint, whole tensors on the CPU; the optimizer's is not read."""
    with explain_read_errors(start, AS_WEIGHTS), forbid_code(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that it is a single process
        weights = {WEIGHTS + name: torch.empty(part.size, dtype=part.properties.dtype)
                   for name, part in _described(local).items() if isinstance(part, TensorStorageMetadata)}
        load(weights, storage_reader=FileSystemReader(local), no_dist=True)
    return {name.removeprefix(WEIGHTS): weight for name, weight in weights.items()}


def read_weights(path: str, setting: str = 'CHECKPOINT') -> tuple[dict[str, Tensor], Optional[Manifest], str]:
    """The weights of a checkpoint, for programs that use a model rather than train it; on one process.

    `path` is the file of a full checkpoint, the folder of a sharded one, or that of a run; local or a URI. `setting` is
    where it is named, for messages. Returns the state dict of the ComposerModel, on the CPU; the manifest, if there is
    one; and where the checkpoint lies. Raises UserError where there is none, it is not whole or damaged, it holds
    objects other than tensors and plain values, or the object store is out of reach.
    """
    with explain_unreachable(setting, path):
        start = start_from_path(path, 'weights', setting=setting)
    assert start.path
    with local_copy(start) as local:
        return (read_sharded if start.sharded else read_full_checkpoint)(local, start), start.manifest, start.path

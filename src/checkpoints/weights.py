"""Reads the weights of any checkpoint of the kit without running code.

The checkpoint may be full or sharded, saved by any number of ranks, on a disk or in an object store.
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
    """Yields the path of a checkpoint on this node's disk, downloaded if needed. Call on every rank of a process group.

    With a `name`, only that file of a sharded checkpoint is downloaded.
    """
    assert start.path
    if '://' not in start.path:
        yield start.path
        return
    with tempfile.TemporaryDirectory() as temp:
        has_ranks = dist.is_initialized()  # else this is one process, also where a launcher has set its variables
        folders = dist.all_gather_object(temp) if has_ranks else [temp]
        local = os.path.join(folders[dist.get_global_rank() - dist.get_local_rank() if has_ranks else 0], 'checkpoint')
        if not has_ranks or dist.get_local_rank() == 0:
            with explain_unreachable(start.setting, start.path):
                _download(start.path, start.sharded, name, local)
        if has_ranks:
            with dist.local_rank_zero_download_and_wait(local):  # a download may take longer than a barrier waits
                dist.barrier()
        yield local
        if has_ranks:
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


def _read_metadata_of_weights(local: str) -> dict[str, Any]:
    """Reads shape and dtype of each weight, by name, from `.metadata` of a sharded checkpoint."""
    with forbid_code():
        metadata = FileSystemReader(local).read_metadata().state_dict_metadata
    return {key.removeprefix(WEIGHTS): weight for key, weight in metadata.items() if key.startswith(WEIGHTS)}


def shapes_in_shards(start: Start) -> dict[str, tuple[int, ...]]:
    """Reads the shapes of the weights in a sharded checkpoint. Call on every rank."""
    with local_copy(start, '.metadata') as local:
        return {name: tuple(getattr(weight, 'size', ())) for name, weight in _read_metadata_of_weights(local).items()}


def read_full_checkpoint(local: str, start: Start) -> dict[str, Any]:
    """Reads the model's state dict from a full checkpoint: memory-mapped CPU tensors; the file may be deleted later."""
    with explain_read_errors(start, AS_WEIGHTS):
        return extract_weights(torch.load(local, map_location='cpu', weights_only=True, mmap=True), start)


def read_sharded(local: str, start: Start) -> dict[str, Tensor]:
    """Reads the model's state dict from a sharded checkpoint: whole CPU tensors, without the optimizer's state."""
    with explain_read_errors(start, AS_WEIGHTS), forbid_code(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch warns that it reads in a single process
        weights = {WEIGHTS + name: torch.empty(weight.size, dtype=weight.properties.dtype)
                   for name, weight in _read_metadata_of_weights(local).items()
                   if isinstance(weight, TensorStorageMetadata)}
        load(weights, storage_reader=FileSystemReader(local), no_dist=True)
    return {name.removeprefix(WEIGHTS): weight for name, weight in weights.items()}


def read_weights(path: str, setting: str = 'CHECKPOINT') -> tuple[dict[str, Tensor], Optional[Manifest], str]:
    """Reads the weights of a checkpoint, for programs that use a model and do not train it; in one process.

    `path` is the file of a full checkpoint, the folder of a sharded one, or the folder of a run; local or a URI.
    Messages begin with `setting`. Returns the state dict of the ComposerModel, on the CPU; the manifest, if there is
    one; and the path of the checkpoint. Raises UserError if there is no whole checkpoint, if it holds objects
    other than tensors and plain values, or where the object store does not answer.
    """
    with explain_unreachable(setting, path):
        start = start_from_path(path, 'weights', setting=setting)
    assert start.path
    with local_copy(start) as local:
        return (read_sharded if start.sharded else read_full_checkpoint)(local, start), start.manifest, start.path

"""The weights out of any checkpoint of the kit, for programs that use a model rather than train it.

Full or sharded, saved by any number of ranks, on a disk or in an object store; on one process, without a process group,
and without running code that a checkpoint may hold.
"""

import os
import tempfile
import warnings
from typing import Optional

import torch
from composer.utils import get_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from src.checkpoints.loading import WEIGHTS
from src.checkpoints.manifest import Manifest
from src.checkpoints.safe_reading import no_code, read_weights, readable
from src.checkpoints.start import Start, given_start, reachable
from src.common.storage import open_folder


def read_sharded_weights(local: str, setting: str, path: str) -> dict[str, Tensor]:
    """The model's state dict out of a sharded checkpoint; the optimizer's state is not read.

    Args:
        local: The folder.
        setting: Where the checkpoint is named, for messages.
        path: Where it lies; `local` may be a copy.

    Returns:
        Whole tensors on the CPU.

    Raises:
        UserError: A file is missing or damaged, or holds objects other than tensors and plain values.
    """
    reader = FileSystemReader(local)
    with readable(setting, path, 'as the weights of a checkpoint'), no_code(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that it is a single process
        there = reader.read_metadata().state_dict_metadata
        weights = {name: torch.empty(part.size, dtype=part.properties.dtype) for name, part in there.items()
                   if name.startswith(WEIGHTS) and isinstance(part, TensorStorageMetadata)}
        load(weights, storage_reader=reader, no_dist=True)
    return {name.removeprefix(WEIGHTS): weight for name, weight in weights.items()}


def find(path: str, setting: str) -> Start:
    """A checkpoint, or of a run's folder its newest whole one.

    Raises:
        UserError: There is none, it is not whole, or the object store is out of reach.
    """
    with reachable(setting, path):
        return given_start(path, 'weights', setting=setting)


def read(path: str, setting: str = 'CHECKPOINT') -> tuple[dict[str, Tensor], Optional[Manifest], str]:
    """The weights of a checkpoint.

    Args:
        path: The file of a full checkpoint, the folder of a sharded one, or that of a run; local or a URI.
        setting: Where it is named, for messages.

    Returns:
        The state dict of the ComposerModel, on the CPU; the manifest, if there is one; where the checkpoint lies.

    Raises:
        UserError: As in `find`, or it is damaged, or holds objects other than tensors and plain values.
    """
    start = find(path, setting)
    assert start.path
    read_local = read_sharded_weights if start.sharded else read_weights
    if '://' not in start.path:
        return read_local(start.path, setting, start.path), start.manifest, start.path
    with tempfile.TemporaryDirectory() as temp:  # the tensors of a file that is mapped outlive its name
        local = os.path.join(temp, 'checkpoint')
        folder = open_folder(start.path)
        with reachable(setting, start.path):
            if start.sharded:
                os.mkdir(local)
            for name in folder.names() if start.sharded else ['']:
                get_file(folder.uri(name) if name else start.path, os.path.join(local, name) if name else local)
        return read_local(local, setting, start.path), start.manifest, start.path

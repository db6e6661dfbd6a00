"""The weights out of any checkpoint of the kit, for programs that use a model rather than train it.

Full or sharded, saved by any number of ranks, on a disk or in an object store; on one process, without a process group, and
without running what a pickle may hold.
"""

import io
import os
import pickle
import tempfile
import warnings
from pathlib import Path
from typing import Any, Optional

import torch
from composer.utils import get_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from src.checkpoints import Manifest, Start, given_start, manifests, read_weights
from src.errors import UserError, first_line
from src.folders import open_folder

PREFIX = 'state.model.'  # of the weights among the names in a sharded checkpoint

# What `.metadata` holds beside plain values and torch's dtypes.
METADATA_CLASSES = {
    'torch.distributed.checkpoint.metadata': ('Metadata', 'TensorStorageMetadata', 'TensorProperties', '_MEM_FORMAT_ENCODING',
                                              'ChunkStorageMetadata', 'BytesStorageMetadata', 'MetadataIndex', 'StorageMeta'),
    'torch.distributed.checkpoint.filesystem': ('_StorageInfo',),
    'torch.serialization': ('_get_layout',), 'torch': ('Size',),
    'pathlib': ('PosixPath',), 'pathlib._local': ('PosixPath',), 'collections': ('OrderedDict',)}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        dtype = module_name == 'torch' and isinstance(getattr(torch, global_name, None), torch.dtype)
        if dtype or global_name in METADATA_CLASSES.get(module_name, ()):
            return super().find_class(module_name, global_name)
        raise pickle.UnpicklingError(f'it holds {module_name}.{global_name}, and loading that would run code')


class _Reader(FileSystemReader):
    """torch's reader, which loads tensors with `weights_only`, but unpickles anything that `.metadata` may hold."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return _MetadataUnpickler(io.BytesIO(Path(self.path, '.metadata').read_bytes())).load()


def read_sharded_weights(path: str, setting: str) -> dict[str, Tensor]:
    """The model's state dict out of a sharded checkpoint; the optimizer's state is not read.

    Args:
        path: A local folder.
        setting: Where it is named, for messages.

    Returns:
        Whole tensors on the CPU.

    Raises:
        UserError: A file is missing or damaged, or holds objects other than tensors and plain values.
    """
    reader = _Reader(path)
    try:
        there = reader.read_metadata().state_dict_metadata
        weights = {name: torch.empty(part.size, dtype=part.properties.dtype) for name, part in there.items()
                   if name.startswith(PREFIX) and isinstance(part, TensorStorageMetadata)}
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # that it is a single process
            load(weights, storage_reader=reader, no_dist=True)
    except (CheckpointException, pickle.UnpicklingError, OSError, RuntimeError, EOFError, AttributeError, KeyError, IndexError,
            TypeError, ValueError) as e:
        cause = next(iter(e.failures.values()))[0] if isinstance(e, CheckpointException) else e
        raise UserError(f'{setting}: {path} cannot be loaded as the weights of a checkpoint: {type(cause).__name__}: '
                        f'{first_line(cause)}; take another checkpoint of the run') from None
    return {name.removeprefix(PREFIX): weight for name, weight in weights.items()}


def find(path: str, setting: str) -> Start:
    """A checkpoint, or of a run's folder its newest whole one.

    Raises:
        UserError: There is none, it is not whole, or the object store is out of reach.
    """
    path = path.rstrip('/')
    try:
        folder = open_folder(path)
        newest = next((m for m in manifests(folder) if m.is_whole(folder)), None)
        return given_start(folder.uri(newest.path) if newest else path, 'weights', setting=setting)
    except UserError:
        raise
    except Exception as e:  # each object store has error classes of its own
        raise UserError(f'{setting}: {path} cannot be read: {type(e).__name__}: {first_line(e)}; check the address, the network '
                        'and the credentials') from None


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
    if '://' not in start.path:
        return (read_sharded_weights if start.sharded else read_weights)(start.path, setting), start.manifest, start.path
    with tempfile.TemporaryDirectory() as temp:  # the tensors of a file that is mapped outlive its name
        local = os.path.join(temp, 'checkpoint')
        folder = open_folder(start.path)
        try:
            if start.sharded:
                os.mkdir(local)
            for name in folder.names() if start.sharded else ['']:
                get_file(folder.uri(name) if name else start.path, os.path.join(local, name) if name else local)
        except Exception as e:  # as above
            raise UserError(f'{setting}: {start.path} cannot be fetched: {type(e).__name__}: {first_line(e)}; check the network, '
                            f'and that the disk of {temp} has room') from None
        return (read_sharded_weights if start.sharded else read_weights)(local, setting), start.manifest, start.path

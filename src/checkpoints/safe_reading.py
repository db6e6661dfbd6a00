"""Reads checkpoints without running code: only tensors and plain values are read, everything else is refused.

A full checkpoint is a pickle, and so are `.metadata` and the values of a sharded checkpoint. Composer 0.32.1 and torch
unpickle objects of any class, which can run code.
"""

import io
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from botocore.exceptions import BotoCoreError, ClientError
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.torch_version import TorchVersion

from src.checkpoints.start import Start
from src.common.errors import UserError, first_line, is_out_of_memory

ONLY_WEIGHTS = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'  # makes torch.load ignore `weights_only=False`

# Classes that Composer's checkpoints hold beside tensors and plain values: random states, times, a version; and NumPy's
# numbers, for the state of callbacks. Add classes of your own in the same way.
SAFE_CLASSES: list[Any] = [
    timedelta, datetime, timezone, TorchVersion, np.ndarray, np.dtype,
    np.array(0).__reduce__()[0], np.float64(0).__reduce__()[0],
    *{type(np.dtype(code)) for code in '?' + np.typecodes['AllInteger'] + np.typecodes['AllFloat']}]
torch.serialization.add_safe_globals(SAFE_CLASSES)

# Classes that `.metadata` holds beside plain values and torch's dtypes.
METADATA_CLASSES = {
    'torch.distributed.checkpoint.metadata': (
        'Metadata', 'TensorStorageMetadata', 'TensorProperties', '_MEM_FORMAT_ENCODING', 'ChunkStorageMetadata',
        'BytesStorageMetadata', 'MetadataIndex', 'StorageMeta'),
    'torch.distributed.checkpoint.filesystem': ('_StorageInfo',),
    'torch.serialization': ('_get_layout',), 'torch': ('Size',),
    'pathlib': ('PosixPath',), 'pathlib._local': ('PosixPath',), 'collections': ('OrderedDict',)}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        is_dtype = module_name == 'torch' and isinstance(getattr(torch, global_name, None), torch.dtype)
        if is_dtype or global_name in METADATA_CLASSES.get(module_name, ()):
            return super().find_class(module_name, global_name)
        raise pickle.UnpicklingError(f'GLOBAL {module_name}.{global_name}')  # the words of torch.load


def _read_metadata(self: FileSystemReader, *args: Any, **kwargs: Any) -> Metadata:
    return _MetadataUnpickler(io.BytesIO(Path(self.path, '.metadata').read_bytes())).load()


@contextmanager
def forbid_code() -> Iterator[None]:
    """Makes torch read only tensors and plain values, also where a library asks for objects of any class."""
    old_value = os.environ.get(ONLY_WEIGHTS)
    os.environ[ONLY_WEIGHTS] = '1'
    try:
        with patch.object(FileSystemReader, 'read_metadata', _read_metadata):
            yield
    finally:
        if old_value is None:
            del os.environ[ONLY_WEIGHTS]
        else:
            os.environ[ONLY_WEIGHTS] = old_value


def root_cause(e: BaseException) -> BaseException:
    """Returns the first rank's error where torch has gathered the errors of all ranks, else the error itself."""
    return next(iter(e.failures.values()), (e,))[0] if isinstance(e, CheckpointException) else e


@contextmanager
def explain_read_errors(start: Start, purpose: str, trust: str = '') -> Iterator[None]:
    """Raises a UserError that says why a checkpoint cannot be read.

    `purpose` completes "cannot be loaded ...". `trust` ends the message where the checkpoint holds other objects than
    tensors and plain values; it says how to allow them.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, MemoryError,
            pickle.UnpicklingError, BotoCoreError, ClientError, CheckpointException) as e:
        cause = root_cause(e)
        if is_out_of_memory(cause) or isinstance(cause, UserError):
            raise cause from None
        unsafe = re.search(r'GLOBAL ([\w.]+)', str(cause))
        detail = re.search(r'WeightsUnpickler error: (.+)', str(cause))
        why = (f'it holds {unsafe[1]}, and loading that would run code' if unsafe
               else f'{type(cause).__name__}: {detail[1] if detail else first_line(cause)}')
        raise UserError(f'{start.setting}: {start.path} cannot be loaded {purpose}: {why}; name another checkpoint'
                        f'{trust if isinstance(cause, pickle.UnpicklingError) else ""}') from None


def extract_weights(checkpoint: Any, start: Start) -> dict[str, Any]:
    """Returns the model's state dict from a loaded checkpoint. Raises UserError if it is not one of Composer's."""
    state = checkpoint.get('state') if isinstance(checkpoint, dict) else None
    weights = state.get('model') if isinstance(state, dict) else None
    if not isinstance(weights, dict):
        raise UserError(f'{start.setting}: {start.path} is not a checkpoint of the kit: it holds no weights under '
                        'state.model; name another file')
    return weights

"""Checks the batches of a loader of your own, fills in what they lack, and splits them into microbatches."""

import logging
from collections.abc import Mapping
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

from src.common.errors import UserError
from src.common.targets import IGNORE_INDEX, targets_per_sample

MODEL_KEYS = ('input_ids', 'labels', 'attention_mask', 'sequence_id')  # models read these; other keys are passed on

log = logging.getLogger('src')


class CheckedBatch(dict[str, Any]):
    """A batch that a BatchChecker has checked."""


class BatchChecker:
    """Checks a batch and fills in what it lacks. Composer calls it as `batch_transforms` of a DataSpec.

    Token ids become int64. A batch without `labels` gets its `input_ids` as labels. Labels at padding become -100.
    Other keys stay as they are. `setting` names the loader in messages. `vocab_size` and `max_seq_len` are the limits
    of the model (None: no limit). A batch that is checked already stays as it is: training counts its targets before
    Composer asks for the check. Raises UserError if the model could not train on the batch.
    """

    def __init__(self, setting: str, vocab_size: int, max_seq_len: Optional[int]) -> None:
        self.setting, self.vocab_size, self.max_seq_len = setting, vocab_size, max_seq_len
        self._has_logged_missing_labels = False

    def __call__(self, batch: Any) -> CheckedBatch:
        if isinstance(batch, CheckedBatch):
            return batch
        values = dict(batch) if isinstance(batch, Mapping) else {}
        if 'input_ids' not in values:
            found = f'has the keys {", ".join(map(str, values))}' if values else f'is a {type(batch).__name__}'
            raise UserError(f'{self.setting}: a batch must be a dict with input_ids, but this one {found}')
        if 'labels' not in values and not self._has_logged_missing_labels:
            self._has_logged_missing_labels = True
            log.info('%s: its batches have no labels, so the model predicts every token of input_ids except padding',
                     self.setting)
        values.setdefault('labels', values['input_ids'])
        ids = {key: self._as_int64(key, values[key]) for key in MODEL_KEYS if key in values}
        self._check_shapes(ids)
        self._check_values(ids)
        if (mask := ids.get('attention_mask')) is not None:
            ids['labels'] = ids['labels'].masked_fill(mask == 0, IGNORE_INDEX)
        return CheckedBatch({**values, **ids, 'n_targets': targets_per_sample(ids)})

    def _as_int64(self, key: str, value: Any) -> Tensor:
        tensor, is_mask = value, key == 'attention_mask'
        if isinstance(value, np.ndarray) and value.dtype.kind in ('iubf' if is_mask else 'iu'):
            tensor = torch.from_numpy(value.astype(np.int64))  # from_numpy takes the machine's byte order alone
        is_linear_or_embedding = isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.numel() > 0
        if is_linear_or_embedding and (is_mask or not (tensor.is_floating_point() or tensor.dtype == torch.bool)):
            return tensor.long()
        found = f'a {type(value).__name__}'
        if isinstance(value, (Tensor, np.ndarray)):
            found = f'{value.dtype} of shape {tuple(value.shape)}'
        raise UserError(f'{self.setting}: {key} of a batch must be whole numbers in a tensor of shape (batch, seq), '
                        f'but is {found}; let the dataset return each sample as tensors, not as lists')

    def _check_shapes(self, ids: dict[str, Tensor]) -> None:
        rows, seq_len = ids['input_ids'].shape
        if self.max_seq_len and seq_len > self.max_seq_len:
            raise UserError(f'{self.setting}: input_ids have {seq_len} tokens in a row, but the model has positions '
                            f'for {self.max_seq_len}; give shorter rows, or set a larger max_seq_len')
        one_longer = [(rows, seq_len + 1)] if 'attention_mask' not in ids else []
        for key, tensor in ids.items():
            allowed = [(rows, seq_len), *(one_longer if key == 'labels' else [])]
            if tuple(tensor.shape) not in allowed:
                raise UserError(f'{self.setting}: {key} have shape {tuple(tensor.shape)}, but input_ids have shape '
                                f'{(rows, seq_len)}; give {key} of shape {" or ".join(map(str, allowed))}')

    def _check_values(self, ids: dict[str, Tensor]) -> None:
        for key in ('input_ids', 'labels'):
            wrong = (ids[key] < 0) | (ids[key] >= self.vocab_size)
            if key == 'labels':
                wrong &= ids[key] != IGNORE_INDEX
            if wrong.any():
                raise UserError(f'{self.setting}: {key} hold {int(ids[key][wrong][0])}, but the model has the token '
                                f'ids 0 to {self.vocab_size - 1} (labels also {IGNORE_INDEX}); set a larger vocabulary '
                                'in section model, or give ids of another tokenizer')
        mask = ids.get('attention_mask')
        if mask is not None and not ((mask == 0) | (mask == 1)).all():
            raise UserError(f'{self.setting}: attention_mask must be 1 at tokens and 0 at padding, but holds '
                            f'{int(mask.min())} and {int(mask.max())}')


def split_batch(batch: Mapping[str, Any], size: Any) -> list[dict[str, Any]]:
    """Splits a batch into microbatches of `size` samples, the last of which may have fewer.

    A value without one entry for each sample goes to every microbatch as a whole.
    """
    rows = len(batch['input_ids'])
    per_sample = {key for key, value in batch.items() if _is_per_sample(value, rows)}
    return [{key: value[start:start + size] if key in per_sample else value for key, value in batch.items()}
            for start in range(0, rows, size)]


def _is_per_sample(value: Any, rows: int) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim > 0 and len(value) == rows
    return isinstance(value, (list, tuple)) and len(value) == rows

"""One batch of a loader of the user's own: checked, completed, and split into microbatches."""

import logging
from collections.abc import Mapping
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

from src.common.errors import UserError
from src.common.targets import IGNORE, targets_per_sample

KEYS = ('input_ids', 'labels', 'attention_mask', 'sequence_id')  # that models read; others are handed on

log = logging.getLogger('src')


class BatchForm:
    """Checks a batch and completes it, before it is split into microbatches: DataSpec's `batch_transforms`.

    Token ids become int64. `labels` that are missing are the `input_ids`; labels of padding become -100. Other keys
    stay. The kit's own loaders give batches in this form. Messages name the loader by `setting`. `vocab_size` is the
    model's, and `max_seq_len` the longest sequence that the model takes; None: any.
    """

    def __init__(self, setting: str, vocab_size: int, max_seq_len: Optional[int]) -> None:
        self.setting, self.vocab_size, self.max_seq_len = setting, vocab_size, max_seq_len
        self._said = False

    def __call__(self, batch: Any) -> dict[str, Any]:
        given = dict(batch) if isinstance(batch, Mapping) else {}
        if 'input_ids' not in given:
            this = f'has the keys {", ".join(map(str, given))}' if given else f'is a {type(batch).__name__}'
            raise UserError(f'{self.setting}: a batch must be a dict with input_ids, and this one {this}')
        if 'labels' not in given and not self._said:
            self._said = True
            log.info('%s: its batches have no labels, so every token of input_ids but padding is predicted',
                     self.setting)
        given.setdefault('labels', given['input_ids'])
        ids = {key: self._whole_numbers(key, given[key]) for key in KEYS if key in given}
        self._check_shapes(ids)
        self._check_values(ids)
        if (mask := ids.get('attention_mask')) is not None:
            ids['labels'] = ids['labels'].masked_fill(mask == 0, IGNORE)
        return {**given, **ids, 'n_targets': targets_per_sample(ids)}

    def _whole_numbers(self, key: str, value: Any) -> Tensor:
        tensor, is_mask = value, key == 'attention_mask'
        if isinstance(value, np.ndarray) and value.dtype.kind in ('iubf' if is_mask else 'iu'):
            tensor = torch.from_numpy(value.astype(np.int64))  # of either byte order
        is_matrix = isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.numel() > 0
        if is_matrix and (is_mask or not (tensor.is_floating_point() or tensor.dtype == torch.bool)):
            return tensor.long()
        this = f'a {type(value).__name__}'
        if isinstance(value, (Tensor, np.ndarray)):
            this = f'{value.dtype} of shape {tuple(value.shape)}'
        raise UserError(f'{self.setting}: {key} of a batch must be whole numbers in a tensor of shape (batch, seq), '
                        f'and is {this}; have the dataset give each sample as tensors, not as lists')

    def _check_shapes(self, ids: dict[str, Tensor]) -> None:
        rows, seq_len = ids['input_ids'].shape
        if self.max_seq_len and seq_len > self.max_seq_len:
            raise UserError(f'{self.setting}: input_ids have {seq_len} tokens in a row, and the model has positions '
                            f'for {self.max_seq_len}; give shorter rows, or set max_seq_len')
        longer = [(rows, seq_len + 1)] if 'attention_mask' not in ids else []
        for key, tensor in ids.items():
            allowed = [(rows, seq_len), *(longer if key == 'labels' else [])]
            if tuple(tensor.shape) not in allowed:
                raise UserError(f'{self.setting}: {key} of shape {tuple(tensor.shape)} do not go with input_ids of '
                                f'shape {(rows, seq_len)}; they must have {" or ".join(map(str, allowed))}')

    def _check_values(self, ids: dict[str, Tensor]) -> None:
        for key in ('input_ids', 'labels'):
            wrong = (ids[key] < 0) | (ids[key] >= self.vocab_size)
            if key == 'labels':
                wrong &= ids[key] != IGNORE
            if wrong.any():
                raise UserError(f'{self.setting}: {key} hold {int(ids[key][wrong][0])}, and the model has the token '
                                f'ids 0 to {self.vocab_size - 1} (labels also {IGNORE}); set a larger vocabulary in '
                                'section model, or give ids of another tokenizer')
        mask = ids.get('attention_mask')
        if mask is not None and not ((mask == 0) | (mask == 1)).all():
            raise UserError(f'{self.setting}: attention_mask must be 1 at tokens and 0 at padding, and holds '
                            f'{int(mask.min())} and {int(mask.max())}')


def split(batch: Mapping[str, Any], size: Any) -> list[dict[str, Any]]:
    """Microbatches of `size` samples; the last may have fewer. What is not one value for each sample goes to all."""
    rows = len(batch['input_ids'])
    divided = {key for key, value in batch.items() if _per_sample(value, rows)}
    return [{key: value[start:start + size] if key in divided else value for key, value in batch.items()}
            for start in range(0, rows, size)]


def _per_sample(value: Any, rows: int) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim > 0 and len(value) == rows
    return isinstance(value, (list, tuple)) and len(value) == rows

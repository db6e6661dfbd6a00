"""Batches, padded or packed, that the tests of the GPTs share, and models whose every weight matters."""

from typing import TypeVar

import torch
from torch import nn

VOCAB = 211
LENGTHS = [[20], [5, 1, 14], [1, 1, 9, 9], [13, 7]]  # of the documents of each row
Model = TypeVar('Model', bound=nn.Module)


def perturb(model: Model) -> Model:
    """Moves all weights a little: at the initial 0 and 1 of biases, norms and layers that begin at 0, mistakes would hide."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def batch(padding: str, seq_len: int, rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and a mask with 3 tokens of padding in the second row, 6 in the third, ..."""
    ids = torch.randint(0, VOCAB, (rows, seq_len), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(rows, seq_len, dtype=torch.bool)
    for row in range(rows):
        n = 3 * row
        if padding == 'right' and n:
            mask[row, -n:] = False
        if padding == 'left':
            mask[row, :n] = False
    return ids, mask


def hf_inputs(ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    return {'input_ids': ids, 'attention_mask': mask.long(), 'position_ids': (mask.long().cumsum(1) - 1).clamp(min=0)}


def packed_batch(lengths: list[list[int]] = LENGTHS) -> dict[str, torch.Tensor]:
    """Rows of several documents, as the loader makes them: the first token of a row's later documents is no target."""
    torch.manual_seed(4)
    ids = torch.randint(0, VOCAB, (len(lengths), sum(lengths[0])))
    sequence_id = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])
    labels = ids.clone()
    labels[:, 1:][sequence_id.diff(dim=1) != 0] = -100
    return {'input_ids': ids, 'labels': labels, 'sequence_id': sequence_id}


def documents_of(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The token ids of each document, row by row."""
    lengths = [numbers.bincount().tolist() for numbers in batch['sequence_id']]
    return [document for ids, row in zip(batch['input_ids'], lengths) for document in ids.split(row)]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients by name; the model forgets them."""
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads

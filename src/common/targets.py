"""Counts the targets of a batch: the positions on which the model is trained."""

from collections.abc import Mapping
from typing import Any, Union

IGNORE_INDEX = -100  # label of a position that is not a target


def targets_per_sample(batch: Mapping[str, Any]) -> list[int]:
    """Counts the targets of each sample: all labels but the first, which models shift away, and without padding.

    The batch has `labels` of shape (batch, seq) or (batch, seq + 1) and, optionally, `attention_mask` (batch, seq).
    """
    trained = batch['labels'][:, 1:] != IGNORE_INDEX
    if 'attention_mask' in batch:  # after padding on the left, nothing predicts the first token
        trained &= batch['attention_mask'][:, :trained.shape[1]].bool()
    return trained.sum(1).tolist()


def get_num_tokens_in_batch(batch: Mapping[str, Any]) -> dict[str, Union[int, float]]:
    """Returns the number of targets of a batch, for Composer's DataSpec; reads `n_targets` if the batch has it.

    `total` is what `max_duration` in tokens counts; `loss_generating` is the weight of a microbatch.
    """
    n = sum(batch['n_targets'] if 'n_targets' in batch else targets_per_sample(batch))
    # Composer divides by the sum over all ranks: avoid 0 / 0 for a batch of empty documents.
    return {'total': n, 'loss_generating': max(n, 1e-6)}

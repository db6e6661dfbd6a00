"""Which positions of a batch are trained on, and how many."""

from collections.abc import Mapping
from typing import Any, Union

IGNORE = -100  # the label of a position that is not trained on


def targets_per_sample(batch: Mapping[str, Any]) -> list[int]:
    """How many positions of each sample are trained on: not the first, as models shift the labels, and no padding.

    The batch has `labels` of shape (batch, seq) or (batch, seq + 1) and, optionally, `attention_mask`, (batch, seq).
    """
    trained = batch['labels'][:, 1:] != IGNORE
    if 'attention_mask' in batch:  # after padding on the left, the first token has nothing to be predicted from
        trained &= batch['attention_mask'][:, :trained.shape[1]].bool()
    return trained.sum(1).tolist()


def get_num_tokens_in_batch(batch: Mapping[str, Any]) -> dict[str, Union[int, float]]:
    """Trained targets of a batch, for Composer's DataSpec: its `n_targets`, or else counted.

    Returns `total`, what `max_duration` in tokens counts, and `loss_generating`, what microbatches are weighted by.
    """
    n = sum(batch['n_targets'] if 'n_targets' in batch else targets_per_sample(batch))
    # Composer divides by the count over all ranks: 0 / 0 where no rank has a target (a batch of empty documents).
    return {'total': n, 'loss_generating': max(n, 1e-6)}

"""Counts the bytes of text that tokens stand for, and sums losses and bytes over samples, for bits per byte."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from src.causal_lm import IGNORE, next_token_targets


def bytes_per_token(tokenizer: Any, vocab_size: int) -> NDArray[np.float64]:
    """The number of UTF-8 bytes of text that each token id stands for; 0 for special tokens, such as EOS.

    In a byte-level BPE every character of a token stands for one byte (Radford et al. 2019, section 2.2), so the
    numbers are exact, also for tokens that hold part of a character. If the tokenizer normalises text, they count the
    normalised text.

    `tokenizer` is a Hugging Face tokenizer, and the model has embeddings for `vocab_size` ids. Returns an array of
    shape (vocab_size,), with NaN where the number is unknown: for ids without a token, for added tokens that remove the
    spaces beside them, and for all tokens if the tokenizer is no byte-level BPE or puts a space before each document.
    """
    lengths = np.full(vocab_size, np.nan)
    if not tokenizer.is_fast:
        return lengths
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model, splits = parts['model'], json.dumps(parts['pre_tokenizer'])
    if (model['type'] != 'BPE' or model['continuing_subword_prefix'] or model['end_of_word_suffix']
            or '"ByteLevel"' not in splits or '"add_prefix_space": true' in splits):
        return lengths
    for token, i in model['vocab'].items():
        lengths[i] = len(token)
    for i, token in tokenizer.added_tokens_decoder.items():
        strips_spaces = token.lstrip or token.rstrip
        lengths[i] = 0 if token.special else np.nan if strips_spaces else len(token.content.encode())
    return lengths


class Totals(Metric):
    """Sums over all samples: nats of loss, targets, bytes of text that the targets stand for, and samples."""

    full_state_update = False
    lengths: Tensor
    sums: Tensor

    def __init__(self, lengths: NDArray) -> None:
        super().__init__()
        self.register_buffer('lengths', torch.from_numpy(lengths), persistent=False)
        # float64: counts are exact, and the sum of the losses depends little on the number of ranks
        self.add_state('sums', torch.zeros(4, dtype=torch.float64), dist_reduce_fx='sum')

    def update(self, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        _, targets = next_token_targets(batch)
        n_targets = outputs['n_targets'].double()
        self.sums[0] += outputs['loss'].double() * n_targets
        self.sums[1] += n_targets
        self.sums[2] += self.lengths[targets[targets != IGNORE]].sum()
        self.sums[3] += len(targets)

    def compute(self) -> Tensor:
        return self.sums

"""How much text a token stands for, and the sums that turn a loss per token into bits per byte."""

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
    """How many UTF-8 bytes of text each token id stands for: 0 for special tokens, such as EOS.

    In a byte-level BPE every character of a token stands for one byte (Radford et al. 2019, section 2.2), so the
    lengths are exact, also of tokens that hold part of a character. Of a tokenizer that normalises its text, they are
    of the result.

    The tokenizer is Hugging Face's own object, and the model has embeddings for `vocab_size` ids. Returns an array of
    shape (vocab_size,), NaN where it is not known: ids without a token, added tokens that swallow the spaces beside
    them, and every token of a tokenizer that is no byte-level BPE, or one that puts a space before each document.
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
        swallows = token.lstrip or token.rstrip
        lengths[i] = 0 if token.special else np.nan if swallows else len(token.content.encode())
    return lengths


class Totals(Metric):
    """Sums over the samples that are counted: nats, targets, bytes of text that the targets stand for, and samples."""

    full_state_update = False
    lengths: Tensor
    sums: Tensor

    def __init__(self, lengths: NDArray) -> None:
        super().__init__()
        self.register_buffer('lengths', torch.from_numpy(lengths), persistent=False)
        # float64: exact for whole numbers, and the sum of the losses does not depend on how many ranks share it
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

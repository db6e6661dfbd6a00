"""Makes training samples of stored rows: uses a row of tokens as it is, and cuts, pads or joins documents."""

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import default_collate, get_worker_info
from transformers import PreTrainedTokenizerBase

from src.common.encoding import count_ids, encode_documents
from src.common.errors import UserError
from src.common.targets import IGNORE_INDEX, targets_per_sample
from src.loader.contents import check_tokens

Row = dict[str, Any]
Sample = dict[str, NDArray[np.int64]]


class SampleMaker:
    """Makes samples of the rows of a dataset. StreamingC4 describes the keys and shapes of a sample.

    `tokenizer` is a Hugging Face tokenizer. `tokenizer_name` and `place` name the tokenizer and the data in messages.
    With `sequence_ids` the samples number their documents.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokenizer_name: str, max_seq_len: int, sequence_ids: bool,
                 place: str) -> None:
        self.tokenizer, self.tokenizer_name, self.place = tokenizer, tokenizer_name, place
        self.max_seq_len, self.sequence_ids = max_seq_len, sequence_ids
        self._n_ids = count_ids(tokenizer)

    def of_tokens(self, rows: list[Row]) -> list[Sample]:
        """One sample for each row of tokens.

        Raises UserError if a row has another length, or an id that the tokenizer does not have.
        """
        return [self._sample(self._checked(row['tokens'])) for row in rows]

    def of_documents(self, rows: list[Row]) -> list[Sample]:
        """One sample for each document, cut or padded to `max_seq_len`."""
        samples = []
        for ids in self._encode(rows):
            n = min(len(ids), self.max_seq_len)
            sample = {'input_ids': np.full(self.max_seq_len, self.tokenizer.pad_token_id, np.int64),
                      'attention_mask': np.zeros(self.max_seq_len, np.int64),
                      'labels': np.full(self.max_seq_len, IGNORE_INDEX, np.int64)}
            sample['input_ids'][:n] = sample['labels'][:n] = ids[:n]
            sample['attention_mask'][:n] = 1
            if self.sequence_ids:
                sample['sequence_id'] = np.zeros(self.max_seq_len, np.int64)
            samples.append(sample)
        return samples

    def of_joined_documents(self, chunks: Iterable[list[Row]]) -> Iterator[Sample]:
        """Joins documents and cuts them into full samples. The last tokens, which do not fill one, are dropped."""
        rest = np.empty(0, np.int64)
        for rows in chunks:
            tokens = np.concatenate([rest, *self._encode(rows)])
            full = len(tokens) // self.max_seq_len * self.max_seq_len
            for ids in tokens[:full].reshape(-1, self.max_seq_len):
                yield self._sample(ids)
            rest = tokens[full:]

    def _checked(self, tokens: NDArray) -> NDArray[np.int64]:
        check_tokens(tokens, self.max_seq_len, self.place)
        ids = tokens.astype(np.int64)
        if ids.view(np.uint64).max() >= self._n_ids:  # unsigned, a negative id is very high: one pass finds both
            wrong = ids[(ids < 0) | (ids >= self._n_ids)][0]
            raise UserError(f'tokenizer_name: {self.tokenizer_name!r} has ids from 0 to {self._n_ids - 1}, but '
                            f'{self.place} holds the token id {wrong}; set the tokenizer that made the tokens, and '
                            'model.vocab_size to its number of ids')
        return ids

    def _sample(self, ids: NDArray[np.int64]) -> Sample:
        """One sample of `max_seq_len` or `max_seq_len + 1` token ids without padding."""
        n, labels = self.max_seq_len, ids.copy()
        if not self.sequence_ids:
            return {'input_ids': ids[:n], 'labels': labels}
        starts = np.zeros(len(ids), bool)  # true at the first token of each document but the first
        starts[1:] = ids[:-1] == self.tokenizer.eos_token_id
        labels[starts] = IGNORE_INDEX
        return {'input_ids': ids[:n], 'labels': labels, 'sequence_id': starts[:n].cumsum()}

    def _encode(self, rows: list[Row]) -> list[NDArray[np.int64]]:
        if get_worker_info() is not None:  # a tokenizer's threads could deadlock after a fork; workers run in parallel
            os.environ['TOKENIZERS_PARALLELISM'] = 'false'
        return encode_documents(self.tokenizer, [row['text'] for row in rows])


def collate(samples: list[Sample]) -> dict[str, Any]:
    """Makes a batch of samples, with the number of targets of each sample in the list `n_targets`.

    Counting here, on the CPU, avoids waiting for the GPU in each microbatch.
    """
    batch = default_collate(samples)
    return {**batch, 'n_targets': targets_per_sample(batch)}

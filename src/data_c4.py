"""C4 as MDS shards, streamed from wherever they lie, tokenized on the fly.

As a program this is the loader's smoke test; it copies nothing when LOCAL is left out:

    python src/data_c4.py REMOTE [LOCAL] [--split val] [--tokenizer NAME_OR_FOLDER]
"""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Optional, Union

if __name__ == '__main__':  # run as `python src/data_c4.py`: import from the repository's root, not from src
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from numpy.typing import NDArray
from streaming import StreamingDataLoader, StreamingDataset
from torch.utils.data import DataLoader, Dataset, get_worker_info

from src.config import parse
from src.data_places import check_places, explain, is_copied, is_url
from src.errors import UserError
from src.schema import LoaderConfig
from src.shared_memory import opening_a_dataset, remove_locks_at_exit
from src.tokenizer import HFTokenizer, encode_documents

IGNORED = -100  # the label that no loss counts
DOCUMENTS_PER_CALL = 64  # a fast tokenizer is several times faster on a list

Sample = dict[str, NDArray[np.int64]]


class StreamingC4(StreamingDataset):
    """Documents of C4 as training samples. `labels` are `input_ids`, not shifted: models shift.

    Every document ends with EOS, which is trained on, also where the tokenizer pads with EOS.

    - `truncate`: a document is a sample, cut or padded to `max_seq_len`; the EOS of one that fills the sample is cut off.
      Keys `input_ids`, `attention_mask`, `labels`, each int64 of shape (max_seq_len,); labels are -100 at padding.
    - `concat`: documents are joined and cut into full samples, one pass an epoch; each worker packs its own documents
      and drops the last tokens that fill no sample. Keys `input_ids`, `labels`. How many samples there are is not known
      beforehand, so there is no length (`len` raises TypeError) and no state to resume an epoch from: Composer then
      trains until the first rank runs out of samples, and resumes by running through the samples it has already seen.

    `dataset[i]` is a document as stored, not tokenized: see `EvalView`.

    Args:
        tokenizer_name: A name on the hub, or a folder.
        max_seq_len: Tokens in a sample.
        group_method: `truncate` or `concat`.
        remote: Where the shards lie: a folder or a URL. None, or the same as `local`: nothing is copied.
        local: Where shards are copied to as they are needed. None: `remote`, which must then be a folder.
        split: The folder below `remote` and `local`.
        **streaming: StreamingDataset's own keywords. Give `batch_size` the DataLoader's batch size.

    Raises:
        UserError: Data or tokenizer is missing, or cannot be read with these settings.
    """

    def __init__(
        self,
        tokenizer_name: str,
        max_seq_len: int,
        group_method: Literal['truncate', 'concat'] = 'truncate',
        remote: Optional[str] = None,
        local: Optional[str] = None,
        split: Optional[str] = None,
        **streaming: Any,
    ) -> None:
        if group_method not in ('truncate', 'concat'):
            raise UserError(f"dataset.group_method: {group_method!r} is not one of 'truncate', 'concat'")
        remote, local = check_places(remote, local, split or '', streaming.get('cache_limit'))
        self.max_seq_len = max_seq_len
        self.group_method = group_method
        self.tokenizer = HFTokenizer(tokenizer_name, max_seq_len).tokenizer
        try:
            with opening_a_dataset():
                super().__init__(remote=remote, local=local, split=split, **{'batch_size': 1, **streaming})
        except Exception as e:  # each object store has error classes of its own
            if not is_url(remote) and not isinstance(e, (OSError, ValueError, RuntimeError, KeyError)):
                raise
            raise UserError(explain(e, remote, local, split or '')) from None
        remove_locks_at_exit(self._shm_prefix_int)
        columns = self.shards[0].column_names  # pyright: ignore[reportAttributeAccessIssue]
        if 'text' not in columns:
            raise UserError(f"dataset: {remote or local}/{split or ''} has no column 'text'; its columns are {columns}")

    def __len__(self) -> int:
        if self.group_method == 'concat':
            raise TypeError('StreamingC4 has no length with group_method concat: samples are packed as they are read')
        return super().__len__()

    # Composer looks for these two with `hasattr`. They count samples that were yielded, which in `concat` are not the
    # documents that streaming counts: with them, Composer would resume in the wrong place.
    @property
    def state_dict(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._unless_concat(super().state_dict)

    @property
    def load_state_dict(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._unless_concat(super().load_state_dict)

    def _unless_concat(self, method: Callable) -> Callable:
        if self.group_method == 'concat':
            raise AttributeError('StreamingC4 has no state with group_method concat')
        return method

    def __iter__(self) -> Iterator[Sample]:
        """One epoch of this rank's, or this worker's, samples."""
        return self._iter_concat() if self.group_method == 'concat' else self._iter_truncate()

    def _iter_truncate(self) -> Iterator[Sample]:
        for documents in self._iter_documents():
            yield from self.truncate(documents)

    def _iter_concat(self) -> Iterator[Sample]:
        rest = np.empty(0, np.int64)
        for documents in self._iter_documents():
            tokens = np.concatenate([rest, *self._encode(documents)])
            full = len(tokens) // self.max_seq_len * self.max_seq_len
            for row in tokens[:full].reshape(-1, self.max_seq_len):
                yield {'input_ids': row, 'labels': row.copy()}
            rest = tokens[full:]

    def _iter_documents(self) -> Iterator[list[dict[str, Any]]]:
        """Lists of documents as stored, in streaming's order."""
        documents = super().__iter__()
        threads = None
        try:
            while chunk := list(islice(documents, DOCUMENTS_PER_CALL)):
                threads = threads or self._iterator
                yield chunk
            if self._event.is_set():  # streaming itself would end the epoch as if there were no more samples
                raise RuntimeError(f'{self.streams[0].remote or self.streams[0].local}: a shard could not be read; see above')
        finally:
            # Else streaming's download threads run on after an epoch that is cut short, and keep the dataset alive.
            if threads is not None:
                threads.non_blocking_exit()

    def truncate(self, documents: list[dict[str, Any]]) -> list[Sample]:
        """One sample for each document as stored."""
        samples = []
        for ids in self._encode(documents):
            n = min(len(ids), self.max_seq_len)
            sample = {'input_ids': np.full(self.max_seq_len, self.tokenizer.pad_token_id, np.int64),
                      'attention_mask': np.zeros(self.max_seq_len, np.int64),
                      'labels': np.full(self.max_seq_len, IGNORED, np.int64)}
            sample['input_ids'][:n] = sample['labels'][:n] = ids[:n]
            sample['attention_mask'][:n] = 1
            samples.append(sample)
        return samples

    def _encode(self, documents: list[dict[str, Any]]) -> list[NDArray[np.int64]]:
        if get_worker_info() is not None:  # workers are the parallelism; the threads of a forked tokenizer could deadlock
            os.environ['TOKENIZERS_PARALLELISM'] = 'false'
        return encode_documents(self.tokenizer, [document['text'] for document in documents])


class EvalView(Dataset):
    """The first samples of a StreamingC4 by index, each of them once.

    As a StreamingDataset iterates, it repeats samples until every rank has as many. Composer drops those that a
    DistributedSampler repeats, so an evaluation over this view counts every sample once, on any number of ranks.

    Args:
        dataset: With `group_method` `truncate`.
        eval_samples: How many; -1: all.
    """

    def __init__(self, dataset: StreamingC4, eval_samples: int = -1) -> None:
        self.dataset = dataset
        self.length = dataset.size if eval_samples == -1 else min(eval_samples, dataset.size)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        """What a DataLoader calls for a batch."""
        if not all(0 <= i < self.length for i in indices):
            raise IndexError(f'{indices} are not all in 0 to {self.length - 1}')
        return self.dataset.truncate([self.dataset[i] for i in indices])


_copied_for_training: set[str] = set()


def build_c4_dataloader(cfg: Union[LoaderConfig, Any], device_batch_size: int, evaluate: bool = False) -> DataLoader:
    """The loader of one `train_loader:` or `eval_loader:` section.

    On several ranks an epoch of training ends when the first rank runs out of samples: Composer sees to that.

    Args:
        cfg: A LoaderConfig, or a mapping that is one.
        device_batch_size: Samples in a batch of this device.
        evaluate: For an evaluation: the first `cfg.eval_samples` samples in order, each once over all ranks.

    Raises:
        UserError: A setting that is wrong, data or a tokenizer that is missing.
    """
    cfg = parse(LoaderConfig, cfg)
    if cfg.num_workers > 0:  # set before the fork, or each worker prints a warning
        os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
    data: dict[str, Any] = cfg.dataset.model_dump() | {'batch_size': device_batch_size}
    settings: dict[str, Any] = cfg.model_dump(exclude={'name', 'dataset', 'eval_samples'}) | {'batch_size': device_batch_size}
    copied = os.path.realpath(os.path.join(cfg.dataset.local, cfg.dataset.split))
    if not evaluate:
        _copied_for_training.add(copied)
        return StreamingDataLoader(StreamingC4(**data), **settings)

    if cfg.dataset.group_method == 'concat':
        raise UserError("eval_loader.dataset.group_method: 'concat' has no fixed set of samples to evaluate; "
                        'set truncate, or evaluate on packed tokens')
    for key in ('shuffle', 'epoch_size'):
        if data.pop(key):
            warnings.warn(f'eval_loader.dataset.{key} is ignored: an evaluation reads its samples in order', stacklevel=2)
    if copied in _copied_for_training and is_copied(cfg.dataset.remote, cfg.dataset.local):
        data['local'] = os.path.join(cfg.dataset.local, 'eval')  # streaming refuses two copies of one split in one place
    from composer.utils.dist import get_sampler  # here: it takes seconds to import, and the smoke test has no need of it

    view = EvalView(StreamingC4(**data), cfg.eval_samples)
    return DataLoader(view, sampler=get_sampler(view, shuffle=False, drop_last=cfg.drop_last), **settings)


def get_num_tokens_in_batch(batch: dict[str, torch.Tensor]) -> dict[str, Union[int, float]]:
    """Trained targets of a batch, for Composer's DataSpec.

    Models shift the labels, so the first of each sample is no target, nor is padding.

    Args:
        batch: `labels` of shape (batch, seq).

    Returns:
        `total`, what `max_duration` in tokens counts, and `loss_generating`, what microbatches are weighted by.
    """
    trained = batch['labels'][:, 1:] != IGNORED
    if 'attention_mask' in batch:  # after padding on the left, the first token has nothing before it to be predicted from
        trained &= batch['attention_mask'][:, :-1].bool()
    n = int(trained.sum())
    # Composer divides by the count over all ranks: 0 / 0 where no rank has a target (a batch of empty documents).
    return {'total': n, 'loss_generating': max(n, 1e-6)}


# ---------------------------------------------------------------- the smoke test

SECONDS = 5.0  # how long the speed is measured, at most


def main(args: argparse.Namespace) -> None:
    dataset = StreamingC4(args.tokenizer, args.max_seq_len, args.group_method, args.remote, args.local, args.split,
                          batch_size=args.batch_size)
    print(f'{args.remote} [{args.split}]: {dataset.size:,} documents in {dataset.num_shards} shards; tokenizer {args.tokenizer}')
    documents = tokens = n_batches = 0
    seconds = 0.0
    batches = iter(DataLoader(dataset, batch_size=args.batch_size, num_workers=args.num_workers))
    while n_batches < 5 or seconds < SECONDS:
        start = time.perf_counter()
        batch = next(batches, None)
        seconds += time.perf_counter() - start
        if batch is None:
            break
        ids, trained = batch['input_ids'], batch['labels'] != IGNORED
        if n_batches < 5:
            print(f'batch {n_batches}: ' + ', '.join(f'{key} {tuple(value.shape)}' for key, value in batch.items()))
            print(f'  {dataset.tokenizer.decode(ids[0][trained[0]])[:100]!r}')
        n_batches += 1
        tokens += int(trained.sum())
        ends = int((ids == dataset.tokenizer.eos_token_id).sum())
        documents += ends if args.group_method == 'concat' else len(ids)
    print(f'{documents:,} documents, {tokens:,} tokens in {seconds:.1f} s: '
          f'{documents / seconds:,.0f} documents/s, {tokens / seconds:,.0f} tokens/s')


def positive(text: str) -> int:
    """A whole number above 0; argparse makes a message of the ValueError."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Smoke test of the loader: five batches, then its speed.')
    parser.add_argument('remote', help='a folder that convert_c4.py made, or a URL such as s3://bucket/my-copy-c4')
    parser.add_argument('local', nargs='?', help='where shards are copied to; default: REMOTE, so that nothing is copied')
    parser.add_argument('--split', default='val')
    parser.add_argument('--tokenizer', help='a hub name or a folder; default: REMOTE/tokenizer if there, else gpt2')
    parser.add_argument('--max_seq_len', type=positive, default=2048)
    parser.add_argument('--group_method', choices=['truncate', 'concat'], default='truncate')
    parser.add_argument('--batch_size', type=positive, default=8)
    parser.add_argument('--num_workers', type=int, choices=range(65), default=0, metavar='N')
    args = parser.parse_args(argv)
    beside = Path(args.remote, 'tokenizer')
    args.tokenizer = args.tokenizer or (str(beside) if beside.is_dir() else 'gpt2')
    return args


if __name__ == '__main__':
    try:
        main(parse_args())
    except UserError as e:
        sys.exit(f'error: {e}')

"""C4 as MDS shards, streamed from wherever they lie: text, tokenized on the fly, or packed tokens.

As a program this is the loader's smoke test; it copies nothing when LOCAL is left out:

    python src/data_c4.py REMOTE [LOCAL] [--split val] [--tokenizer NAME_OR_FOLDER]
"""

import argparse
import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Optional, Union

if __name__ == '__main__':  # run as `python src/data_c4.py`: import from the repository's root, not from src
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from numpy.typing import NDArray
from streaming import StreamingDataLoader, StreamingDataset
from streaming.base.distributed import get_world_size
from torch.utils.data import DataLoader, Dataset, get_worker_info

from src.config import parse
from src.data_places import check_places, explain, is_copied, is_url
from src.errors import UserError
from src.processes import init_loader_worker
from src.sample_order import whole_batches
from src.schema import LoaderConfig
from src.shared_memory import opening_a_dataset, remove_locks_at_exit
from src.tokenizer import HFTokenizer, encode_documents

IGNORED = -100  # the label that no loss counts
ROWS_PER_CALL = 64  # a fast tokenizer is several times faster on a list

Sample = dict[str, NDArray[np.int64]]


class StreamingC4(StreamingDataset):
    """C4 as training samples. `labels` are `input_ids`, not shifted: models shift.

    Every document ends with EOS, which is trained on, also where the tokenizer pads with EOS. The index tells what the
    samples are made from. Where it has a column `tokens`, each array of integers, of shape (max_seq_len,), is a sample,
    whatever `group_method` says: keys `input_ids`, `labels`. Else the column `text` holds documents:

    - `truncate`: a document is a sample, cut or padded to `max_seq_len`; the EOS of one that fills the sample is cut off.
      Keys `input_ids`, `attention_mask`, `labels`, each int64 of shape (max_seq_len,); labels are -100 at padding.
    - `concat`: documents are joined and cut into full samples, one pass an epoch; each worker packs its own documents
      and drops the last tokens that fill no sample. Keys `input_ids`, `labels`. How many samples there are is not known
      beforehand, so there is no length (`len` raises TypeError) and no state to resume an epoch from: Composer then
      trains until the first rank runs out of samples, and resumes by running through the samples it has already seen.

    `dataset[i]` is a row as stored: see `EvalView`.

    Args:
        tokenizer_name: A name on the hub, or a folder.
        max_seq_len: Tokens in a sample.
        group_method: `truncate` or `concat`; what happens to `text`.
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
        self.place = os.path.join(remote or local, split or '')
        self.column = self._find_column()

    def _find_column(self) -> Literal['text', 'tokens']:
        shard: Any = self.shards[0]
        encodings = dict(zip(shard.column_names, shard.column_encodings))
        if 'tokens' not in encodings:
            if 'text' not in encodings:
                raise UserError(f"dataset: {self.place} has no column 'text' (documents) and no column 'tokens' (sequences); "
                                f'its columns are {shard.column_names}')
            return 'text'
        encoding, dtype, shape = (encodings['tokens'] + '::').split(':')[:3]  # as ndarray:uint16:128; the last two may be missing
        if encoding != 'ndarray' or (dtype and not dtype.startswith(('int', 'uint'))):
            raise UserError(f"dataset: column 'tokens' of {self.place} is {encodings['tokens']!r}; it must hold arrays of "
                            "integers, as 'ndarray:uint16' does")
        if shape:
            self._check_shape(tuple(map(int, shape.split(','))))
        elif Path(shard.dirname, shard.split, shard.raw_data.basename).is_file():
            self._packed(shard[0]['tokens'])
        return 'tokens'

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 1:
            raise UserError(f"dataset: column 'tokens' of {self.place} holds arrays of shape {shape}; each must be one sequence, "
                            f'of shape ({self.max_seq_len},)')
        if shape[0] != self.max_seq_len:
            raise UserError(f'dataset.max_seq_len: {self.max_seq_len}, but the sequences in {self.place} have {shape[0]} tokens; '
                            f'set max_seq_len={shape[0]}, or make the data anew with sequences of {self.max_seq_len}')

    @property
    def packs_on_the_fly(self) -> bool:
        """Whether samples are made while documents are read, so that nobody knows how many there are."""
        return self.column == 'text' and self.group_method == 'concat'

    @property
    def fingerprint(self) -> str:
        """A digest of what the index says of columns and shards: ranks that read the same data have the same."""
        shards: Any = self.shards
        says = [[s.column_names, s.column_encodings, s.samples, asdict(s.raw_data)] for s in shards]
        return hashlib.sha256(json.dumps(says, sort_keys=True).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        if self.packs_on_the_fly:
            raise TypeError('StreamingC4 has no length with group_method concat: samples are packed as they are read')
        return super().__len__()

    # Composer looks for these two with `hasattr`. They count samples that were yielded, which are not the documents that
    # streaming counts where samples are packed on the fly: with them, Composer would resume in the wrong place.
    @property
    def state_dict(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._unless_packing(self._state)

    @property
    def load_state_dict(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._unless_packing(self._load_state)

    def _unless_packing(self, method: Callable) -> Callable:
        if self.packs_on_the_fly:
            raise AttributeError('StreamingC4 has no state with group_method concat')
        return method

    def _state(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0:
            # After an epoch Composer counts 0 samples of the next one, whereas streaming goes on to it only when it is begun,
            # and would resume with the epoch that has just ended.
            state['epoch'] = max(state['epoch'], self.next_epoch)
        return state

    def _load_state(self, obj: Optional[dict[str, Any]]) -> None:
        if obj is None:
            raise UserError('the checkpoint holds no place in these samples: its run packed them on the fly. Go on with '
                            'that data, or start a new run from its weights with load_weights_only=true')
        super().load_state_dict(obj)
        # Streaming takes these from the state for the epoch that it resumes; they must hold in later ones, too.
        self.num_canonical_nodes, self.shuffle_seed = obj['num_canonical_nodes'], obj['shuffle_seed']

    def __iter__(self) -> Iterator[Sample]:
        """One epoch of this rank's, or this worker's, samples."""
        if self.packs_on_the_fly:
            return self._iter_concat()
        return (sample for rows in self._iter_rows() for sample in self.samples(rows))

    def _iter_concat(self) -> Iterator[Sample]:
        rest = np.empty(0, np.int64)
        for documents in self._iter_rows():
            tokens = np.concatenate([rest, *self._encode(documents)])
            full = len(tokens) // self.max_seq_len * self.max_seq_len
            for row in tokens[:full].reshape(-1, self.max_seq_len):
                yield {'input_ids': row, 'labels': row.copy()}
            rest = tokens[full:]

    def _iter_rows(self) -> Iterator[list[dict[str, Any]]]:
        """Lists of rows as stored, in streaming's order."""
        rows = super().__iter__()
        threads = None
        try:
            while chunk := list(islice(rows, ROWS_PER_CALL)):
                threads = threads or self._iterator
                yield chunk
            if self._event.is_set():  # streaming itself would end the epoch as if there were no more samples
                raise RuntimeError(f'{self.place}: a shard could not be read; see above')
        finally:
            # Else streaming's download threads run on after an epoch that is cut short, and keep the dataset alive.
            if threads is not None:
                threads.non_blocking_exit()

    def samples(self, rows: list[dict[str, Any]]) -> list[Sample]:
        """One sample for each row as stored: a sequence of tokens, or a document, cut or padded."""
        return [self._packed(row['tokens']) for row in rows] if self.column == 'tokens' else self._truncated(rows)

    def _packed(self, tokens: NDArray) -> Sample:
        if tokens.dtype.kind not in 'iu':
            raise UserError(f"dataset: column 'tokens' of {self.place} holds {tokens.dtype}; it must hold integers")
        self._check_shape(tokens.shape)
        ids = tokens.astype(np.int64)
        return {'input_ids': ids, 'labels': ids.copy()}

    def _truncated(self, documents: list[dict[str, Any]]) -> list[Sample]:
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
        dataset: One that does not pack on the fly.
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
        return self.dataset.samples([self.dataset[i] for i in indices])


_copied_for_training: set[str] = set()


def build_c4_dataloader(cfg: Union[LoaderConfig, Any], device_batch_size: int, evaluate: bool = False) -> DataLoader:
    """The loader of one `train_loader:` or `eval_loader:` section.

    In training every rank has as many batches in an epoch, all of them full, and no sample is repeated. Where samples are
    packed on the fly, an epoch ends when the first rank runs out of them: Composer sees to that.

    Args:
        cfg: A LoaderConfig, or a mapping that is one.
        device_batch_size: Samples in a batch of this device.
        evaluate: For an evaluation: the first `cfg.eval_samples` samples in order, each once over all ranks.

    Raises:
        UserError: A setting that is wrong, data or a tokenizer that is missing, or too little data.
    """
    cfg = parse(LoaderConfig, cfg)
    if cfg.num_workers > 0:  # set before the fork, or each worker prints a warning
        os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
    data: dict[str, Any] = cfg.dataset.model_dump() | {'batch_size': device_batch_size}
    settings: dict[str, Any] = cfg.model_dump(exclude={'name', 'dataset', 'eval_samples'}) | {
        'batch_size': device_batch_size, 'worker_init_fn': init_loader_worker,
        # Else each epoch draws a number from the generator of dropout, and a resumed run would draw it once more.
        'generator': torch.Generator().manual_seed(cfg.dataset.shuffle_seed)}
    copied = os.path.realpath(os.path.join(cfg.dataset.local, cfg.dataset.split))
    if not evaluate:
        _copied_for_training.add(copied)
        dataset = StreamingC4(**data)
        _prepare_epochs(dataset, device_batch_size)
        return StreamingDataLoader(dataset, **settings)

    for key in ('shuffle', 'epoch_size'):
        if data.pop(key):
            warnings.warn(f'eval_loader.dataset.{key} is ignored: an evaluation reads its samples in order', stacklevel=2)
    if copied in _copied_for_training and is_copied(cfg.dataset.remote, cfg.dataset.local):
        data['local'] = os.path.join(cfg.dataset.local, 'eval')  # streaming refuses two copies of one split in one place
    from composer.utils.dist import get_sampler  # here: it takes seconds to import, and the smoke test has no need of it

    dataset = StreamingC4(**data)
    if dataset.packs_on_the_fly:
        raise UserError("eval_loader.dataset.group_method: 'concat' has no fixed set of samples to evaluate; "
                        'set truncate, or evaluate on packed tokens')
    view = EvalView(dataset, cfg.eval_samples)
    return DataLoader(view, sampler=get_sampler(view, shuffle=False, drop_last=cfg.drop_last), **settings)


def _prepare_epochs(dataset: StreamingC4, device_batch_size: int) -> None:
    """Has epochs of training hold whole global batches, where the samples can be counted."""
    n, nodes = dataset.epoch_size, dataset.num_canonical_nodes
    if dataset.shuffle and nodes is not None and n < nodes:
        raise UserError(f'train_loader.dataset.num_canonical_nodes: {nodes} is more than the {n} samples of an epoch from '
                        f'{dataset.place}; set a smaller number, such as 1')
    if dataset.packs_on_the_fly:
        return
    global_batch_size = device_batch_size * get_world_size()
    if n < global_batch_size:
        raise UserError(f'train_loader: an epoch holds not one full batch: {dataset.place} holds {n} samples, fewer than '
                        f'global_train_batch_size {global_batch_size}; use more data or a smaller global_train_batch_size')
    dataset.partition_algo = whole_batches.__name__
    dataset.length = n // global_batch_size * device_batch_size  # of this rank; Composer ends an epoch there


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
    rows = 'documents' if dataset.column == 'text' else 'sequences'
    print(f'{args.remote} [{args.split}]: {dataset.size:,} {rows} in {dataset.num_shards} shards; tokenizer {args.tokenizer}')
    n_rows = tokens = n_batches = 0
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
        n_rows += int((ids == dataset.tokenizer.eos_token_id).sum()) if dataset.packs_on_the_fly else len(ids)
    print(f'{n_rows:,} {rows}, {tokens:,} tokens in {seconds:.1f} s: '
          f'{n_rows / seconds:,.0f} {rows}/s, {tokens / seconds:,.0f} tokens/s')


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

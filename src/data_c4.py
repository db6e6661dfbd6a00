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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from math import ceil
from mmap import PAGESIZE
from pathlib import Path
from typing import Any, Literal, Optional, Union

if __name__ == '__main__':  # run as `python src/data_c4.py`: import from the repository's root, not from src
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from src.common.machine import set_up_output
    set_up_output()

import numpy as np
import torch
from numpy.typing import NDArray
from streaming.base.distributed import get_world_size
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from src.common.errors import UserError, positive
from src.common.machine import shorten_socket_paths
from src.common.workers import init_loader_worker
from src.config.check import parse
from src.config.data_checks import NO_SET_OF_SAMPLES
from src.config.data_places import explain, is_copied, stream_errors, streams_of
from src.config.schema import LoaderConfig
from src.loader.provenance import check_tokenizer
from src.loader.sample_order import batches_in_epoch, whole_batches
from src.loader.shared_memory import check_loader, opening_a_dataset, remove_locks_at_exit
from src.loader.streams import CheckedDataset, CheckedStream, EvalLoader, TrainLoader, check_tokens, held_by
from src.tokenizer import HFTokenizer, encode_documents, n_ids

IGNORED = -100  # the label that no loss counts
ROWS_PER_CALL = 64  # a fast tokenizer is several times faster on a list

Sample = dict[str, NDArray[np.int64]]


class StreamingC4(CheckedDataset):
    """C4 as training samples. `labels` are token ids, not shifted: models shift.

    Every document ends with EOS, which is trained on, also where the tokenizer pads with EOS. The index tells what the
    samples are made from. Where it has a column `tokens`, each array of integers is a sample, whatever `group_method` says:
    keys `input_ids`, `labels`. Its length is N = max_seq_len, or N = max_seq_len + 1: then `input_ids` are the first
    max_seq_len tokens, and `labels`, of shape (N,), are all, so that the last position has a target too. Else the column
    `text` holds documents:

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
        streams: By name, instead of `remote` and `local`: the keywords of a StreamConfig for each of several streams.
        sequence_ids: Adds the key `sequence_id`, int64 of shape (max_seq_len,), which numbers the documents of a sample from
            0, and sets labels to -100 at the first token of each but the sample's first: no target lies across a border.
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
        streams: Optional[Mapping[str, Mapping[str, Any]]] = None,
        sequence_ids: bool = False,
        **streaming: Any,
    ) -> None:
        if group_method not in ('truncate', 'concat'):
            raise UserError(f"dataset.group_method: {group_method!r} is not one of 'truncate', 'concat'")
        self.max_seq_len = max_seq_len
        self._shapes = ((max_seq_len,), (max_seq_len + 1,))
        self.group_method = group_method
        self.sequence_ids = sequence_ids
        kit_tokenizer = HFTokenizer(tokenizer_name, max_seq_len)
        self.tokenizer, self.tokenizer_name = kit_tokenizer.tokenizer, tokenizer_name
        self._n_ids = n_ids(self.tokenizer)
        named = {f'dataset.streams.{name}': {**stream, 'split': stream.get('split') or split} for name, stream in
                 (streams or {}).items()} or {'dataset': {'remote': remote, 'local': local, 'split': split}}
        opened = [CheckedStream(name, streaming.get('cache_limit'), **kwargs) for name, kwargs in named.items()]
        try:
            with opening_a_dataset():
                super().__init__(**{'batch_size': 1, **streaming, 'streams': opened})
        except (OSError, ValueError, RuntimeError, KeyError) as e:
            if isinstance(e, UserError):
                raise
            raise UserError(explain(e, opened[0].remote, opened[0].local, opened[0].split)) from None
        remove_locks_at_exit(self._shm_prefix_int)
        self.place = ', '.join(stream.place for stream in opened)
        held = {stream.setting: held_by(stream, self.shards[int(first)], max_seq_len)
                for stream, first in zip(opened, self.shard_offset_per_stream)}
        if len(set(held.values())) > 1:
            raise UserError('dataset.streams: all must hold text, or all tokens of one length, but ' +
                            '; '.join(f'{name} holds {what}' for name, what in held.items()))
        self.column = 'text' if 'text' in held.values() else 'tokens'
        for stream in opened if self.column == 'tokens' else ():
            check_tokenizer(stream, kit_tokenizer)

    @property
    def packs_on_the_fly(self) -> bool:
        """Whether samples are made while documents are read, so that nobody knows how many there are."""
        return self.column == 'text' and self.group_method == 'concat'

    def batch_bytes(self, batch_size: int) -> int:
        """Bytes of shared memory that a batch takes: int64 tensors of shape (batch, max_seq_len), in whole pages."""
        tensors = 2 + self.sequence_ids + (self.column == 'text' and self.group_method == 'truncate')
        return tensors * PAGESIZE * ceil(8 * batch_size * self.max_seq_len / PAGESIZE)

    @property
    def fingerprint(self) -> str:
        """A digest of what the indices say, and of each stream's weight: ranks that read the same data have the same."""
        shards: Any = self.shards
        says = [[[s.column_names, s.column_encodings, s.samples, asdict(s.raw_data)] for s in shards],
                [[int(n), int(stream.choose)] for n, stream in zip(self.shards_per_stream, self.streams)]]
        return hashlib.sha256(json.dumps(says, sort_keys=True).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        if self.packs_on_the_fly:
            raise TypeError('StreamingC4 has no length with group_method concat: samples are packed as they are read')
        return super().__len__()

    # Composer looks for these two with `hasattr`. They count samples that were yielded, which are not the documents that
    # streaming counts where samples are packed on the fly: with them, Composer would resume in the wrong place.
    @property
    def state_dict(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._unless_packing(super().state_dict)

    @property
    def load_state_dict(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._unless_packing(super().load_state_dict)

    def _unless_packing(self, method: Callable) -> Callable:
        if self.packs_on_the_fly:
            raise AttributeError('StreamingC4 has no state with group_method concat')
        return method

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
                yield self._sample(row)
            rest = tokens[full:]

    def _iter_rows(self) -> Iterator[list[dict[str, Any]]]:
        """Lists of rows as stored, in streaming's order; one by one where no tokenizer gains from several."""
        rows = super().__iter__()
        threads = None
        try:
            while chunk := list(islice(rows, ROWS_PER_CALL if self.column == 'text' else 1)):
                threads = threads or self._iterator
                yield chunk
        finally:
            # Else streaming's download threads run on after an epoch that is cut short, and keep the dataset alive.
            if threads is not None:
                threads.non_blocking_exit()

    def samples(self, rows: list[dict[str, Any]]) -> list[Sample]:
        """One sample for each row as stored: a sequence of tokens, or a document, cut or padded."""
        return [self._packed(row['tokens']) for row in rows] if self.column == 'tokens' else self._truncated(rows)

    def _packed(self, tokens: NDArray) -> Sample:
        if tokens.dtype.kind not in 'iu' or tokens.shape not in self._shapes:
            check_tokens(tokens, self.max_seq_len, self.place)
        ids = tokens.astype(np.int64)
        if ids.view(np.uint64).max() >= self._n_ids:  # unsigned, where a negative id is a high one: one pass for both
            wrong = ids[(ids < 0) | (ids >= self._n_ids)][0]
            raise UserError(f'tokenizer_name: {self.tokenizer_name!r} has ids from 0 to {self._n_ids - 1}, and '
                            f'{self.place} holds the token id {wrong}; set the tokenizer that made the tokens, and '
                            'model.vocab_size to its number of ids')
        return self._sample(ids)

    def _sample(self, ids: NDArray[np.int64]) -> Sample:
        """One sample of max_seq_len tokens, or one more, that are all trained on."""
        n, labels = self.max_seq_len, ids.copy()
        if not self.sequence_ids:
            return {'input_ids': ids[:n], 'labels': labels}
        starts = np.zeros(len(ids), bool)  # of every document but the first
        starts[1:] = ids[:-1] == self.tokenizer.eos_token_id
        labels[starts] = IGNORED
        return {'input_ids': ids[:n], 'labels': labels, 'sequence_id': starts[:n].cumsum()}

    def _truncated(self, documents: list[dict[str, Any]]) -> list[Sample]:
        samples = []
        for ids in self._encode(documents):
            n = min(len(ids), self.max_seq_len)
            sample = {'input_ids': np.full(self.max_seq_len, self.tokenizer.pad_token_id, np.int64),
                      'attention_mask': np.zeros(self.max_seq_len, np.int64),
                      'labels': np.full(self.max_seq_len, IGNORED, np.int64)}
            sample['input_ids'][:n] = sample['labels'][:n] = ids[:n]
            sample['attention_mask'][:n] = 1
            if self.sequence_ids:
                sample['sequence_id'] = np.zeros(self.max_seq_len, np.int64)
            samples.append(sample)
        return samples

    def _encode(self, documents: list[dict[str, Any]]) -> list[NDArray[np.int64]]:
        if get_worker_info() is not None:  # workers are the parallelism; the threads of a forked tokenizer could deadlock
            os.environ['TOKENIZERS_PARALLELISM'] = 'false'
        return encode_documents(self.tokenizer, [document['text'] for document in documents])


class EvalView(Dataset):
    """The first samples of a StreamingC4 by index, each of them once; of several streams, the first of each.

    As a StreamingDataset iterates, it repeats samples until every rank has as many. Composer drops those that a
    DistributedSampler repeats, so an evaluation over this view counts every sample once, on any number of ranks.

    Args:
        dataset: One that does not pack on the fly.
        eval_samples: How many; -1: all. Streams have shares in proportion to their sizes.
    """

    def __init__(self, dataset: StreamingC4, eval_samples: int = -1) -> None:
        self.dataset = dataset
        n = dataset.size if eval_samples == -1 else min(eval_samples, dataset.size)
        ends = n * dataset.samples_per_stream.cumsum() // dataset.size  # of the streams' shares in the view
        self.indices = np.concatenate([begin + np.arange(share) for begin, share in
                                       zip(dataset.sample_offset_per_stream, np.diff(ends, prepend=0))])

    @property
    def fingerprint(self) -> str:
        """That of the dataset."""
        return self.dataset.fingerprint

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        """What a DataLoader calls for a batch."""
        if not all(0 <= i < len(self) for i in indices):
            raise IndexError(f'{indices} are not all in 0 to {len(self) - 1}')
        return self.dataset.samples([self.dataset[self.indices[i]] for i in indices])


def targets_per_sample(batch: Mapping[str, torch.Tensor]) -> list[int]:
    """How many positions of each sample are trained on. Models shift the labels, so the first is no target, nor is padding.

    Args:
        batch: `labels` of shape (batch, seq) or (batch, seq + 1); optionally `attention_mask`, (batch, seq).
    """
    trained = batch['labels'][:, 1:] != IGNORED
    if 'attention_mask' in batch:  # after padding on the left, the first token has nothing before it to be predicted from
        trained &= batch['attention_mask'][:, :trained.shape[1]].bool()
    return trained.sum(1).tolist()


def collate(samples: list[Sample]) -> dict[str, Any]:
    """A batch, with `n_targets`, a list: counted here, since to count on a GPU is to wait for it with every microbatch."""
    batch = default_collate(samples)
    return {**batch, 'n_targets': targets_per_sample(batch)}


def get_num_tokens_in_batch(batch: Mapping[str, Any]) -> dict[str, Union[int, float]]:
    """Trained targets of a batch, for Composer's DataSpec.

    Args:
        batch: From `collate`, or one that `targets_per_sample` takes.

    Returns:
        `total`, what `max_duration` in tokens counts, and `loss_generating`, what microbatches are weighted by.
    """
    n = sum(batch['n_targets'] if 'n_targets' in batch else targets_per_sample(batch))
    # Composer divides by the count over all ranks: 0 / 0 where no rank has a target (a batch of empty documents).
    return {'total': n, 'loss_generating': max(n, 1e-6)}


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
    if errors := stream_errors(cfg.dataset):
        raise UserError('\n'.join(errors))
    if cfg.num_workers > 0:
        shorten_socket_paths()
        os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')  # set before the fork, or each worker prints a warning
    data: dict[str, Any] = cfg.dataset.model_dump() | {'batch_size': device_batch_size}
    settings: dict[str, Any] = cfg.model_dump(exclude={'name', 'dataset', 'eval_samples'}) | {
        'batch_size': device_batch_size, 'worker_init_fn': init_loader_worker, 'collate_fn': collate,
        # Else each epoch draws a number from the generator of dropout, and a resumed run would draw it once more.
        'generator': torch.Generator().manual_seed(cfg.dataset.shuffle_seed)}
    copies = {os.path.realpath(os.path.join(stream.local, stream.split or '')) for stream in streams_of(cfg.dataset).values()
              if is_copied(stream.remote, stream.local, stream.split)}
    if not evaluate:
        _copied_for_training.update(copies)
        dataset = StreamingC4(**data)
        _prepare_epochs(dataset, device_batch_size)
        loader = TrainLoader(dataset, **settings)
        check_loader('train_loader', loader, dataset.batch_bytes(device_batch_size), 8 * dataset.epoch_size)
        return loader

    for key in ('shuffle', 'epoch_size'):
        if data.pop(key):
            warnings.warn(f'eval_loader.dataset.{key} is ignored: an evaluation reads its samples in order', stacklevel=2)
    clash = not copies.isdisjoint(_copied_for_training)  # streaming refuses two copies of one split in one place
    for name, stream in (data['streams'] or {'': data}).items():
        if clash and is_copied(stream['remote'], stream['local'], stream['split'] or data['split']):
            stream['local'] = os.path.join(stream['local'], 'eval')
        for key in ('proportion', 'repeat', 'choose') if name else ():
            if stream.pop(key) is not None:
                warnings.warn(f'eval_loader.dataset.streams.{name}.{key} is ignored: an evaluation reads all', stacklevel=2)
    from composer.utils.dist import (
        get_sampler,  # here: it takes seconds to import, and the smoke test has no need of it
    )

    dataset = StreamingC4(**data)
    if dataset.packs_on_the_fly:
        raise UserError(NO_SET_OF_SAMPLES)
    view = EvalView(dataset, cfg.eval_samples)
    loader = EvalLoader(view, sampler=get_sampler(view, shuffle=False, drop_last=cfg.drop_last), **settings)
    check_loader('eval_loader', loader, dataset.batch_bytes(device_batch_size))
    return loader


def _prepare_epochs(dataset: StreamingC4, device_batch_size: int) -> None:
    """Has epochs of training hold whole global batches, where the samples can be counted."""
    n, nodes = dataset.epoch_size, dataset.num_canonical_nodes
    if dataset.batching_method != 'random':  # which shuffle each stream on its own
        n = min(stream.choose for stream in dataset.streams)
    if dataset.shuffle and nodes is not None and n < nodes:
        raise UserError(f'train_loader.dataset.num_canonical_nodes: {nodes} is more than the {n} samples of an epoch from '
                        f'{dataset.place}; set a smaller number, such as 1')
    n = dataset.epoch_size
    if dataset.packs_on_the_fly:
        return
    global_batch_size = device_batch_size * get_world_size()
    if n < global_batch_size:
        raise UserError(f'train_loader: an epoch holds not one full batch: {dataset.place} holds {n} samples, fewer than '
                        f'global_train_batch_size {global_batch_size}; use more data or a smaller global_train_batch_size')
    dataset.partition_algo = whole_batches.__name__
    # Of this rank; Composer ends an epoch there
    dataset.length = batches_in_epoch(dataset, global_batch_size) * device_batch_size


# ---------------------------------------------------------------- the smoke test

SECONDS = 5.0  # how long the speed is measured, at most


def main(args: argparse.Namespace) -> None:
    dataset = StreamingC4(args.tokenizer, args.max_seq_len, args.group_method, args.remote, args.local, args.split,
                          batch_size=args.batch_size)
    shorten_socket_paths()
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
        ids, trained = batch['labels'], batch['labels'] != IGNORED
        if n_batches < 5:
            print(f'batch {n_batches}: ' + ', '.join(f'{key} {tuple(value.shape)}' for key, value in batch.items()))
            print(f'  {dataset.tokenizer.decode(ids[0][trained[0]])[:100]!r}')
        n_batches += 1
        tokens += int(trained.sum())
        n_rows += int((ids == dataset.tokenizer.eos_token_id).sum()) if dataset.packs_on_the_fly else len(ids)
    print(f'{n_rows:,} {rows}, {tokens:,} tokens in {seconds:.1f} s: '
          f'{n_rows / seconds:,.0f} {rows}/s, {tokens / seconds:,.0f} tokens/s')


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
        sys.exit(f'error: {e}'.replace('tokenizer_name', '--tokenizer'))

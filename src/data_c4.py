"""The dataset and the loaders of training: MDS shards of text or packed tokens, streamed from a folder or a store.

As a program it tests the loader. Without LOCAL it reads REMOTE in place:

    python src/data_c4.py REMOTE [LOCAL] [--split val] [--tokenizer NAME_OR_FOLDER]
"""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from math import ceil
from mmap import PAGESIZE
from pathlib import Path
from typing import Any, Literal, Optional, Union

if __name__ == '__main__':  # run as `python src/data_c4.py`: import from the repository's root, not from src
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from src.common.machine import set_up_output
    set_up_output()

import torch
from streaming.base.distributed import get_rank, get_world_size
from torch.utils.data import DataLoader, DistributedSampler

from src.common.encoding import prepare
from src.common.errors import UserError, positive_int
from src.common.machine import shorten_socket_paths
from src.common.targets import IGNORE_INDEX
from src.common.workers import init_loader_worker
from src.config.check import parse
from src.config.data_checks import CONCAT_EVALUATION_ERROR
from src.config.data_places import is_copied, stream_errors, streams_of
from src.config.schema import LoaderConfig
from src.loader.contents import check_tokenizer, find_column
from src.loader.dataset import CheckedDataset, EvalLoader, TrainLoader
from src.loader.sample_order import EvalView, batches_in_epoch, deal_whole_batches
from src.loader.samples import Row, Sample, SampleMaker, collate
from src.loader.shared_memory import check_loader
from src.tokenizer import HFTokenizer

ROWS_PER_CALL = 64  # a fast tokenizer is several times faster on a list of documents


class StreamingC4(CheckedDataset):
    """A StreamingDataset of training samples, made of text or of packed tokens. `labels` are not shifted: models shift.

    Every document ends with EOS. The model is trained on this EOS, also if the tokenizer pads with EOS. The index of
    the dataset decides how samples are made.

    Column `tokens`: each row, an array of integers, is a sample. Keys `input_ids` and `labels`. `group_method` has no
    effect. A row has `max_seq_len` or `max_seq_len + 1` tokens. With one more, `input_ids` are the first `max_seq_len`
    tokens and `labels` all of them, so that the last position has a target too.

    Column `text`: each row is a document, and `group_method` decides:

    - `truncate`: a document is a sample, cut or padded to `max_seq_len`. Cutting also removes the EOS. Keys
      `input_ids`, `attention_mask`, `labels`, each int64 of shape (max_seq_len,); labels are -100 at padding.
    - `concat`: documents are joined and cut into full samples. Each worker packs its own documents and drops the last
      tokens, which do not fill a sample. Keys `input_ids`, `labels`. The number of samples is not known beforehand, so
      the dataset has no length (`len` raises TypeError) and no state. Composer trains until the first rank has no more
      samples, and a resumed run reads all earlier samples of its epoch again.

    `dataset[i]` is a row as stored; `EvalView` makes samples of such rows.

    Args:
        tokenizer_name: A name on the hub, or a folder.
        max_seq_len: Tokens in a sample.
        group_method: `truncate` or `concat`; for text only.
        remote: The folder or URL of the shards. None, or the same as `local`: nothing is copied.
        local: The folder that shards are copied to when they are needed. None: `remote`, which must be a folder.
        split: The folder below `remote` and `local`.
        streams: Instead of `remote` and `local`: the keywords of a StreamConfig for each stream, by its name.
        sequence_ids: Adds the key `sequence_id`, int64 of shape (max_seq_len,), which numbers the documents of a sample
            from 0. The first token of each further document gets the label -100.
        **streaming: StreamingDataset's own keywords. `batch_size` must be the DataLoader's batch size.

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
        tokenizer = HFTokenizer(tokenizer_name, max_seq_len)
        self.tokenizer, self.tokenizer_name = tokenizer.tokenizer, tokenizer_name
        self.max_seq_len, self.group_method, self.sequence_ids = max_seq_len, group_method, sequence_ids
        by_setting = {f'dataset.streams.{name}': {**stream, 'split': stream.get('split') or split}
                      for name, stream in (streams or {}).items()}
        super().__init__(by_setting or {'dataset': {'remote': remote, 'local': local, 'split': split}},
                         **{'batch_size': 1, **streaming})
        self.column = find_column(self, max_seq_len)
        for stream in self.streams if self.column == 'tokens' else ():
            check_tokenizer(stream, tokenizer)
        if self.column == 'text':
            prepare(self.tokenizer)  # before the fork of the loader's workers
        self._maker = SampleMaker(self.tokenizer, tokenizer_name, max_seq_len, sequence_ids, self.place)

    @property
    def packs_on_the_fly(self) -> bool:
        """Whether samples are packed while documents are read, so that their number is not known."""
        return self.column == 'text' and self.group_method == 'concat'

    def batch_bytes(self, batch_size: int) -> int:
        """Bytes of shared memory for a batch: int64 tensors of shape (batch, max_seq_len), in whole pages."""
        tensors = 2 + self.sequence_ids + (self.column == 'text' and self.group_method == 'truncate')
        return tensors * PAGESIZE * ceil(8 * batch_size * self.max_seq_len / PAGESIZE)

    def __len__(self) -> int:
        if self.packs_on_the_fly:
            raise TypeError('StreamingC4 has no length with group_method concat: samples are packed as they are read')
        return super().__len__()

    # Composer looks for these properties with `hasattr`. Composer counts samples, but streaming counts documents. If
    # samples are packed on the fly, the two counts differ, and Composer would resume at the wrong sample.
    @property
    def state_dict(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._raise_if_packing(super().state_dict)

    @property
    def load_state_dict(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._raise_if_packing(super().load_state_dict)

    def _raise_if_packing(self, method: Callable) -> Callable:
        if self.packs_on_the_fly:
            raise AttributeError('StreamingC4 has no state with group_method concat')
        return method

    def __iter__(self) -> Iterator[Sample]:
        """The samples of one epoch for this rank, or for this loader worker."""
        if self.packs_on_the_fly:
            return self._maker.of_joined_documents(self._iter_rows())
        return (sample for rows in self._iter_rows() for sample in self.samples(rows))

    def _iter_rows(self) -> Iterator[list[Row]]:
        """Lists of rows as stored, in streaming's order: many documents for the tokenizer, or one row of tokens."""
        rows = super().__iter__()
        threads = None
        try:
            while chunk := list(islice(rows, ROWS_PER_CALL if self.column == 'text' else 1)):
                threads = threads or self._iterator
                yield chunk
        finally:
            # Otherwise streaming's download threads outlive an epoch that is cut short, and keep the dataset alive.
            if threads is not None:
                threads.non_blocking_exit()

    def samples(self, rows: list[Row]) -> list[Sample]:
        """One sample for each row as stored: a row of tokens as it is, a document cut or padded."""
        return self._maker.of_tokens(rows) if self.column == 'tokens' else self._maker.of_documents(rows)


_copied_for_training: set[str] = set()  # folders that hold copies of training shards


def build_c4_dataloader(cfg: Union[LoaderConfig, Any], device_batch_size: int, evaluate: bool = False) -> DataLoader:
    """Builds the loader of a section `train_loader` or `eval_loader`.

    In training, every rank has the same number of batches in an epoch, all batches are full, and no sample is repeated.
    If samples are packed on the fly, Composer ends an epoch when the first rank has no more samples.

    Args:
        cfg: A LoaderConfig, or a mapping with its keys.
        device_batch_size: Samples in a batch of this device.
        evaluate: Build the loader of an evaluation: the first `cfg.eval_samples` samples in order, each once over all
            ranks.

    Raises:
        UserError: A setting is wrong, data or tokenizer is missing, or there is too little data.
    """
    cfg = parse(LoaderConfig, cfg)
    if errors := stream_errors(cfg.dataset):
        raise UserError('\n'.join(errors))
    if cfg.num_workers > 0:
        shorten_socket_paths()
        os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')  # before the fork: else each worker prints a warning
    settings: dict[str, Any] = cfg.model_dump(exclude={'name', 'dataset', 'eval_samples'}) | {
        'batch_size': device_batch_size, 'worker_init_fn': init_loader_worker, 'collate_fn': collate,
        # Else the loader draws a number from dropout's generator in each epoch, and once more in a resumed run.
        'generator': torch.Generator().manual_seed(cfg.dataset.shuffle_seed)}
    return (_eval_loader if evaluate else _train_loader)(cfg, device_batch_size, settings)


def _copy_folders(cfg: LoaderConfig) -> set[str]:
    return {os.path.realpath(os.path.join(stream.local, stream.split or ''))
            for stream in streams_of(cfg.dataset).values() if is_copied(stream.remote, stream.local, stream.split)}


def _train_loader(cfg: LoaderConfig, device_batch_size: int, settings: dict[str, Any]) -> DataLoader:
    _copied_for_training.update(_copy_folders(cfg))
    dataset = StreamingC4(**cfg.dataset.model_dump(), batch_size=device_batch_size)
    _prepare_epochs(dataset, device_batch_size)
    loader = TrainLoader(dataset, **settings)
    check_loader('train_loader', loader, dataset.batch_bytes(device_batch_size), 8 * dataset.epoch_size)
    return loader


def _eval_loader(cfg: LoaderConfig, device_batch_size: int, settings: dict[str, Any]) -> DataLoader:
    data = cfg.dataset.model_dump()
    _drop_with_warning(data, ('shuffle', 'epoch_size'), 'dataset', 'reads its samples in order')
    for name, stream in (data['streams'] or {}).items():
        _drop_with_warning(stream, ('proportion', 'repeat', 'choose'), f'dataset.streams.{name}',
                           'reads from each stream in proportion to its size')
    if not _copy_folders(cfg).isdisjoint(_copied_for_training):  # streaming refuses two datasets with one local folder
        for place in (data['streams'] or {'': data}).values():
            if is_copied(place['remote'], place['local'], place['split'] or data['split']):
                place['local'] = os.path.join(place['local'], 'eval')
    dataset = StreamingC4(**data, batch_size=device_batch_size)
    if dataset.packs_on_the_fly:
        raise UserError(CONCAT_EVALUATION_ERROR)
    view = EvalView(dataset, cfg.eval_samples)
    sampler = DistributedSampler(view, get_world_size(), get_rank(), shuffle=False, drop_last=cfg.drop_last)
    loader = EvalLoader(view, sampler=sampler, **settings)
    check_loader('eval_loader', loader, dataset.batch_bytes(device_batch_size))
    return loader


def _drop_with_warning(settings: dict[str, Any], keys: tuple[str, ...], section: str, reason: str) -> None:
    """Removes keys that have no effect in an evaluation, and warns of those that are set."""
    for key in keys:
        if settings.pop(key):
            warnings.warn(f'eval_loader.{section}.{key} is ignored: an evaluation {reason}', stacklevel=2)


def _prepare_epochs(dataset: StreamingC4, device_batch_size: int) -> None:
    """Gives training whole global batches in each epoch, if the number of samples is known."""
    n, nodes = dataset.epoch_size, dataset.num_canonical_nodes
    if dataset.batching_method != 'random':  # the other methods shuffle each stream on its own
        n = min(stream.choose for stream in dataset.streams)
    if dataset.shuffle and nodes is not None and n < nodes:
        raise UserError(f'train_loader.dataset.num_canonical_nodes: {nodes} is more than the {n} samples of an epoch '
                        f'from {dataset.place}; set a smaller number, such as 1')
    n = dataset.epoch_size
    if dataset.packs_on_the_fly:
        return
    global_batch_size = device_batch_size * get_world_size()
    if n < global_batch_size:
        raise UserError(f'train_loader: an epoch holds less than one full batch: {dataset.place} holds {n} samples, '
                        f'fewer than global_train_batch_size {global_batch_size}; use more data or a smaller '
                        'global_train_batch_size')
    dataset.partition_algo = deal_whole_batches.__name__
    # The samples of this rank; Composer ends an epoch there
    dataset.length = batches_in_epoch(dataset, global_batch_size) * device_batch_size


# ---------------------------------------------------------------- the program that tests the loader

SECONDS = 5.0  # the longest time for which the speed is measured


def main(args: argparse.Namespace) -> None:
    dataset = StreamingC4(args.tokenizer, args.max_seq_len, args.group_method, args.remote, args.local, args.split,
                          batch_size=args.batch_size)
    shorten_socket_paths()
    rows = 'documents' if dataset.column == 'text' else 'sequences'
    print(f'{args.remote} [{args.split}]: {dataset.size:,} {rows} in {dataset.num_shards} shards; tokenizer '
          f'{args.tokenizer}')
    n_rows = tokens = n_batches = 0
    seconds = 0.0
    batches = iter(DataLoader(dataset, batch_size=args.batch_size, num_workers=args.num_workers))
    while n_batches < 5 or seconds < SECONDS:
        start = time.perf_counter()
        batch = next(batches, None)
        seconds += time.perf_counter() - start
        if batch is None:
            break
        ids, trained = batch['labels'], batch['labels'] != IGNORE_INDEX
        if n_batches < 5:
            print(f'batch {n_batches}: ' + ', '.join(f'{key} {tuple(value.shape)}' for key, value in batch.items()))
            print(f'  {dataset.tokenizer.decode(ids[0][trained[0]])[:100]!r}')
        n_batches += 1
        tokens += int(trained.sum())
        n_rows += int((ids == dataset.tokenizer.eos_token_id).sum()) if dataset.packs_on_the_fly else len(ids)
    print(f'{n_rows:,} {rows}, {tokens:,} tokens in {seconds:.1f} s: '
          f'{n_rows / seconds:,.0f} {rows}/s, {tokens / seconds:,.0f} tokens/s')


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Tests the loader: prints five batches, then the speed.')
    parser.add_argument('remote', help='a folder that convert_c4.py made, or a URL such as s3://bucket/my-copy-c4')
    parser.add_argument('local', nargs='?', help='the folder to copy shards to; default: read REMOTE in place')
    parser.add_argument('--split', default='val', help='default: val')
    parser.add_argument('--tokenizer', help='a hub name or a folder; default: REMOTE/tokenizer if it exists, else gpt2')
    parser.add_argument('--max_seq_len', type=positive_int, default=2048)
    parser.add_argument('--group_method', choices=['truncate', 'concat'], default='truncate')
    parser.add_argument('--batch_size', type=positive_int, default=8)
    parser.add_argument('--num_workers', type=int, choices=range(65), default=0, metavar='N')
    args = parser.parse_args(argv)
    folder = Path(args.remote, 'tokenizer')
    args.tokenizer = args.tokenizer or (str(folder) if folder.is_dir() else 'gpt2')
    return args


if __name__ == '__main__':
    try:
        main(parse_args())
    except UserError as e:
        sys.exit(f'error: {e}'.replace('tokenizer_name', '--tokenizer'))

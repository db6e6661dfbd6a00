"""Checks settings of the loaders and of the evaluation that are each valid, but impossible together."""

import os
from collections.abc import Iterator
from typing import Optional

from src.common.errors import UserError
from src.config.data_places import is_url, read_columns, stream_errors, streams_of
from src.config.schema import Config, DatasetConfig, GPTConfig, LoaderConfig

CONCAT_EVALUATION_ERROR = ("eval_loader.dataset.group_method: 'concat' has no fixed set of samples to evaluate; "
                           'set truncate, or evaluate on packed tokens')


def data_errors(c: Config, num_nodes: int, uses_kit_loader: bool) -> Iterator[str]:
    """One line for each mistake in `train_loader` and `eval_loader`.

    If not `uses_kit_loader`, the `dataset` sections are not checked: the user's own loader may use them differently.
    """
    train = c.train_loader.dataset
    for name, loader in loader_sections(c).items():
        yield from _loader_errors(c, name, loader)
        if uses_kit_loader:
            yield from (f'{name}.{error}' for error in stream_errors(loader.dataset))
            yield from _document_errors(c, name, loader.dataset)
    nodes = train.num_canonical_nodes
    if uses_kit_loader and nodes % num_nodes and num_nodes % nodes and packs_on_the_fly(train):
        yield (f'train_loader.dataset.num_canonical_nodes: {nodes} must be a multiple or a divisor of the number of '
               f'nodes, which is {num_nodes}; set a multiple of every number of nodes that you will use, such as '
               f'{nodes * num_nodes}')
    if uses_kit_loader and c.eval_loader:
        yield from _split_errors(c, train, c.eval_loader.dataset)
    if 'eval_samples' in c.train_loader.model_fields_set:
        yield (f'train_loader.eval_samples: {c.train_loader.eval_samples} has no effect on training; set eval_samples '
               'to limit the evaluation, or train_loader.dataset.epoch_size to limit an epoch')
    if c.eval_loader and c.eval_loader.eval_samples == 0:
        yield 'eval_samples: 0 would evaluate nothing; set a number above 0, -1 for all, or eval_loader=null'
    if c.eval_loader and c.device_eval_batch_size is None and c.device_train_microbatch_size == 'auto':
        yield ("device_eval_batch_size: missing; its default is device_train_microbatch_size, but that is 'auto', "
               'which works only in training; set a number')


def loader_sections(c: Config) -> dict[str, LoaderConfig]:
    """The loaders in the config by the names of their sections; `eval_loader` may be absent."""
    return {'train_loader': c.train_loader, **({'eval_loader': c.eval_loader} if c.eval_loader else {})}


def _loader_errors(c: Config, name: str, loader: LoaderConfig) -> Iterator[str]:
    data = loader.dataset
    if isinstance(c.model, GPTConfig) and data.max_seq_len > c.model.max_seq_len:
        yield (f'{name}.dataset.max_seq_len: {data.max_seq_len} is above model.max_seq_len {c.model.max_seq_len}; '
               f'set model.max_seq_len={data.max_seq_len}, or {name}.dataset.max_seq_len={c.model.max_seq_len}')
    for key in ('prefetch_factor', 'persistent_workers', 'timeout'):
        value = getattr(loader, key)
        if value and loader.num_workers == 0:
            yield f'{name}.{key}: {value!r} needs worker processes; set {name}.num_workers above 0, or remove {key}'


def _document_errors(c: Config, name: str, data: DatasetConfig) -> Iterator[str]:
    within = getattr(c.model, 'attn_within_document', None)  # None: the model has no such setting
    if within is None and data.sequence_ids:
        yield (f'{name}.dataset.sequence_ids: true works only with mosaic_gpt and modern_gpt; {c.model.name!r} would '
               f'attend across documents; set {name}.dataset.sequence_ids=false')
    elif within is not None and within != data.sequence_ids:
        yield (f'model.attn_within_document: {str(within).lower()} does not go with {name}.dataset.sequence_ids '
               f'{str(data.sequence_ids).lower()}; remove sequence_ids from both datasets: it then follows the model')


def packs_on_the_fly(data: DatasetConfig) -> bool:
    """Whether the loader packs text into samples while it reads. Data without a readable index counts as text."""
    if data.group_method != 'concat':
        return False
    return not any('tokens' in (read_columns(place) or ()) for place in _places(data)[:1])  # all have one format


def _places(data: DatasetConfig) -> list[str]:
    """The folder or address that each stream is read from; folders as absolute paths, to compare them."""
    paths = (os.path.join(stream.remote or stream.local, stream.split or '') for stream in streams_of(data).values())
    return [path if is_url(path) else os.path.realpath(path) for path in paths]


def _split_errors(c: Config, train: DatasetConfig, evals: DatasetConfig) -> Iterator[str]:
    if packs_on_the_fly(evals):
        yield CONCAT_EVALUATION_ERROR
    if set(_places(train)) & set(_places(evals)) and not c.allow_same_split:
        yield (f'eval_loader.dataset.split: {evals.split!r} is also what train_loader reads, so the run would evaluate '
               'on its training data; change one of the splits, or set allow_same_split=true if you want this')


def check_seq_len(c: Config, max_positions: Optional[int]) -> None:
    """Refuses sequences longer than the model's positions; for a Hugging Face model they are known once it is built."""
    for name, loader in loader_sections(c).items():
        if max_positions and loader.dataset.max_seq_len > max_positions:
            raise UserError(f'{name}.dataset.max_seq_len: {loader.dataset.max_seq_len} is above the {max_positions} '
                            'positions of the model; set a smaller max_seq_len, or more positions in '
                            'model.config_overrides')

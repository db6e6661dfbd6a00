"""Settings of the loaders and of the evaluation that are valid one by one and impossible together."""

import os
from collections.abc import Iterator
from typing import Optional

from src.common.errors import UserError
from src.config.data_places import columns_of, is_url, stream_errors, streams_of
from src.config.schema import Config, DatasetConfig, LoaderConfig, MosaicGPTConfig

NO_SET_OF_SAMPLES = ("eval_loader.dataset.group_method: 'concat' has no fixed set of samples to evaluate; "
                     'set truncate, or evaluate on packed tokens')


def data_errors(c: Config, num_nodes: int, kits_loader: bool) -> Iterator[str]:
    """One line for each mistake in `train_loader` and `eval_loader`.

    A loader of the user's own may read something else than the sections `dataset` name: those are the kit's loader's.
    """
    train = c.train_loader.dataset
    for name, loader in loaders(c).items():
        yield from _loader_errors(c, name, loader)
        if kits_loader:
            yield from (f'{name}.{error}' for error in stream_errors(loader.dataset))
            yield from _document_errors(c, name, loader.dataset)
    nodes = train.num_canonical_nodes
    if kits_loader and nodes % num_nodes and num_nodes % nodes and packs_on_the_fly(train):
        yield (f'train_loader.dataset.num_canonical_nodes: {nodes} neither divides nor is divided by the {num_nodes} '
               'nodes; set a multiple of the numbers of nodes that the run will have, such as '
               f'{nodes * num_nodes}')
    if kits_loader and c.eval_loader:
        yield from _split_errors(c, train, c.eval_loader.dataset)
    if 'eval_samples' in c.train_loader.model_fields_set:
        yield (f'train_loader.eval_samples: {c.train_loader.eval_samples} bounds an evaluation; set eval_samples for '
               'that, and train_loader.dataset.epoch_size for training')
    if c.eval_loader and c.eval_loader.eval_samples == 0:
        yield 'eval_samples: 0 would evaluate nothing; set a number above 0, -1 for all, or eval_loader=null'
    if c.eval_loader and c.device_eval_batch_size is None and c.device_train_microbatch_size == 'auto':
        yield ("device_eval_batch_size: missing; its default is device_train_microbatch_size, and that is 'auto', "
               'which is searched in training alone; set a number')


def loaders(c: Config) -> dict[str, LoaderConfig]:
    """The loaders that there are, by their sections."""
    return {'train_loader': c.train_loader, **({'eval_loader': c.eval_loader} if c.eval_loader else {})}


def _loader_errors(c: Config, name: str, loader: LoaderConfig) -> Iterator[str]:
    data = loader.dataset
    if isinstance(c.model, MosaicGPTConfig) and data.max_seq_len > c.model.max_seq_len:
        yield (f'{name}.dataset.max_seq_len: {data.max_seq_len} is above model.max_seq_len {c.model.max_seq_len}; '
               f'set model.max_seq_len={data.max_seq_len}, or {name}.dataset.max_seq_len={c.model.max_seq_len}')
    for key in ('prefetch_factor', 'persistent_workers', 'timeout'):
        value = getattr(loader, key)
        if value and loader.num_workers == 0:
            yield f'{name}.{key}: {value!r} needs worker processes; set {name}.num_workers above 0, or remove it'


def _document_errors(c: Config, name: str, data: DatasetConfig) -> Iterator[str]:
    within = getattr(c.model, 'attn_within_document', None)  # None: a model without it
    if within is None and data.sequence_ids:
        yield (f'{name}.dataset.sequence_ids: true is for model.name: mosaic_gpt, and this is {c.model.name!r}, which '
               f'would attend across documents; set {name}.dataset.sequence_ids=false')
    elif within is not None and within != data.sequence_ids:
        yield (f'model.attn_within_document: {str(within).lower()} does not go with {name}.dataset.sequence_ids '
               f'{str(data.sequence_ids).lower()}; leave sequence_ids out of both datasets, for it follows the model')


def packs_on_the_fly(data: DatasetConfig) -> bool:
    """Whether samples are packed while documents are read. Data that cannot be read is taken for text."""
    if data.group_method != 'concat':
        return False
    return not any('tokens' in (columns_of(place) or ()) for place in _places(data)[:1])  # all streams are alike


def _places(data: DatasetConfig) -> list[str]:
    """Where each stream of a split is read from, in one spelling."""
    paths = (os.path.join(stream.remote or stream.local, stream.split or '') for stream in streams_of(data).values())
    return [path if is_url(path) else os.path.realpath(path) for path in paths]


def _split_errors(c: Config, train: DatasetConfig, evals: DatasetConfig) -> Iterator[str]:
    if packs_on_the_fly(evals):
        yield NO_SET_OF_SAMPLES
    if set(_places(train)) & set(_places(evals)) and not c.allow_same_split:
        yield (f'eval_loader.dataset.split: {evals.split!r} is also what train_loader reads, so the evaluation would '
               'be of the training data; change one, or set allow_same_split=true if that is what you want')


def check_seq_len(c: Config, max_positions: Optional[int]) -> None:
    """Refuses sequences that the model has no positions for; a Hugging Face model's limit is known once it is built."""
    for name, loader in loaders(c).items():
        if max_positions and loader.dataset.max_seq_len > max_positions:
            raise UserError(f'{name}.dataset.max_seq_len: {loader.dataset.max_seq_len} is above the {max_positions} '
                            'positions of the model; set a smaller max_seq_len, or more positions in '
                            'model.config_overrides')

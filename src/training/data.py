"""What the Trainer is given of a loader: the kit's own, or any other whose batches are dicts of token ids."""

from collections.abc import Iterator, Mapping
from typing import Any, Optional

import torch
from composer.core import DataSpec
from composer.utils import dist
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from src import data_c4
from src.causal_lm import ComposerCausalLM
from src.common.errors import UserError
from src.common.targets import get_num_tokens_in_batch
from src.config.schema import Config
from src.data_c4 import build_c4_dataloader
from src.loader.batch_form import BatchForm, split
from src.loader.sample_order import EvalView
from src.loader.wrapped_loader import (
    Batches,
    SizedBatches,
    describe_loader,
    epoch_length,
    has_state,
    sampler_of,
    unwrap_loader,
)
from src.tokenizer import check_vocab


def has_kits_loader() -> bool:
    """Whether `build_c4_dataloader` is the kit's own: then the config's sections `dataset` say what is read."""
    return build_c4_dataloader is data_c4.build_c4_dataloader


def reads_kit_dataset(loader: Any) -> bool:
    """Whether a loader reads the kit's own dataset."""
    return isinstance(getattr(loader, 'dataset', None), (data_c4.StreamingC4, EvalView))


def _kits_dataset(loader: Any) -> data_c4.StreamingC4:
    """What a loader of the kit reads, without the view of an evaluation."""
    return loader.dataset.dataset if isinstance(loader.dataset, EvalView) else loader.dataset


def build_data_spec(loader: Any, setting: str, model: ComposerCausalLM, seed: int) -> DataSpec:
    """Wraps a loader for the Trainer.

    `loader` is a DataLoader, or another iterable of batches that begins anew each time that it is iterated. `setting`
    is `train_loader` or `eval_loader`, for messages. The model's vocabulary and positions bound the batches. `seed` is
    that of the order of a DataLoader that has no random generator of its own. Raises UserError where it is no loader,
    all ranks would read the same samples, or the batches of an evaluation can be read only once.
    """
    form = None
    if reads_kit_dataset(loader):
        check_vocab(_kits_dataset(loader), model.vocab_size)
    else:
        loader = _prepared(loader, setting, seed)
        form = BatchForm(setting, model.vocab_size, model.max_seq_len)
    count: Any = get_num_tokens_in_batch  # Composer's type says int, its code takes any number
    return DataSpec(loader, batch_transforms=form, split_batch=split,
                    get_num_samples_in_batch=lambda batch: len(batch['input_ids']), get_num_tokens_in_batch=count)


def _prepared(loader: Any, setting: str, seed: int) -> Any:
    """A loader of the user's own, checked, and in Batches where Composer cannot save a place in it."""
    ranks, evaluate = dist.get_world_size(), setting == 'eval_loader'
    if isinstance(loader, (Mapping, str)) or not (hasattr(loader, '__iter__') or hasattr(loader, '__getitem__')):
        raise UserError(f'{setting}: build_c4_dataloader returned a {type(loader).__name__}; have it return one '
                        'DataLoader, a list of batches, or an object whose __iter__ begins anew')
    if evaluate and isinstance(loader, Iterator):
        raise UserError(f'eval_loader: a {type(loader).__name__} can be read only once, and each evaluation reads the '
                        'loader anew; give a DataLoader, a list, or an object whose __iter__ begins anew')
    if isinstance(loader, DataLoader):
        if loader.generator is None:
            loader.generator = torch.Generator().manual_seed(seed + dist.get_global_rank())
        if ranks > 1 and type(sampler_of(loader)) in (SequentialSampler, RandomSampler):
            raise UserError(f'{setting}: the DataLoader has no DistributedSampler, so each of {ranks} ranks would read '
                            'the same samples; give it sampler=composer.utils.dist.get_sampler(dataset, shuffle=True). '
                            'Where the dataset is already cut for each rank, make it an IterableDataset, or give it a '
                            'sampler of a class of your own, as `class Mine(torch.utils.data.RandomSampler): pass`')
    # Of a sampler that Composer knows, it leaves out the samples that come twice in an evaluation.
    drops_repeated = isinstance(loader, DataLoader) and any(
        isinstance(sampler, DistributedSampler) for sampler in (loader.batch_sampler, loader.sampler))
    if evaluate and drops_repeated or has_state(loader):
        return loader
    length = epoch_length(loader)
    if not evaluate:  # ranks that disagree would have other learning rates
        lengths: list[Any] = dist.all_gather_object(length)
        length = None if None in lengths else min(lengths)
    return Batches(loader, evaluate) if length is None else SizedBatches(loader, evaluate, length)


def resumes_by_samples(loader: Any) -> bool:
    """Whether a resumed run goes on from a number of samples, and not from a number of batches."""
    return isinstance(loader, DataLoader) and hasattr(loader.dataset, 'load_state_dict')


def fingerprints(train: Optional[DataSpec], evals: Optional[DataSpec]) -> dict[str, str]:
    """The fingerprints of the kit's datasets, by setting: ranks that read the same data have the same."""
    loaders: dict[str, Any] = {'train_loader': train and train.dataloader, 'eval_loader': evals and evals.dataloader}
    return {f'{name}.dataset': _kits_dataset(loader).fingerprint for name, loader in loaders.items()
            if reads_kit_dataset(loader)}


def check_train_loader(c: Config, loader: Any) -> None:
    """Holds the settings that need an epoch's length, or a batch's size, against a loader that may know neither.

    Raises UserError where the loader does not have what a setting needs.
    """
    for setting, time in (('max_duration', c.max_duration), ('scheduler.t_warmup', c.scheduler.t_warmup),
                          ('scheduler.t_max', c.scheduler.t_max)):
        if time.endswith('ep') and epoch_length(loader) is None:
            raise UserError(f'{setting}: {time!r}, but the train loader, {describe_loader(loader)}, does not say how '
                            'many batches an epoch has; give batches (ba) or tokens (tok)')
    if c.device_train_microbatch_size == 'auto' and getattr(loader, 'batch_size', None) is None:
        raise UserError("device_train_microbatch_size: 'auto' begins with the batch_size of the train loader, and "
                        f'{describe_loader(loader)} has none; set a number')


def check_first_batch(spec: DataSpec) -> None:
    """Reads a batch of an evaluation that the user's own loader gives: the first evaluation may be hours away.

    Raises UserError where there is none, or the model does not take it.
    """
    if reads_kit_dataset(spec.dataloader):
        return
    batch = next(iter(spec.dataloader), None)
    if batch is None:
        raise UserError('eval_loader: it gave no batch, so there is nothing to evaluate')
    spec.batch_transforms(batch)


def describe(loader: Any) -> list[str]:
    """Lines for the plan: about a loader of the user's own, or about text that is packed while it is read."""
    dataset = getattr(loader, 'dataset', None)
    if getattr(dataset, 'packs_on_the_fly', False):
        return ['data: text packed on the fly: the samples depend on the numbers of ranks and workers, and a resumed '
                'run first reads again what its epoch has read; packed tokens do neither']
    if reads_kit_dataset(loader):
        return []
    length, ranks = epoch_length(loader), dist.get_world_size()
    number = 'an unknown number of' if length is None else length
    resumed = 'first reads again what its epoch has read'
    if resumes_by_samples(loader):
        resumed = 'goes on from a number of samples'
    lines = [f'data: a loader of your own, {describe_loader(loader)}, with {number} batches in an epoch; a resumed run '
             f'{resumed}']
    own = unwrap_loader(loader)
    if ranks > 1 and not (isinstance(own, DataLoader) and isinstance(sampler_of(own), DistributedSampler)):
        lines.append(f'data: no DistributedSampler divides the samples among {ranks} ranks: where the loader does not '
                     'do that itself, each rank trains on the same samples')
    return lines

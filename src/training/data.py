"""Prepares a loader for the Trainer: the kit's own, or any other whose batches are dicts of token ids."""

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
from src.loader.batch_form import BatchChecker, split_batch
from src.loader.sample_order import EvalView
from src.loader.wrapped_loader import (
    OrderedBatches,
    SizedBatches,
    can_save_place,
    count_batches,
    describe_loader,
    find_sampler,
    unwrap_loader,
)
from src.tokenizer import check_vocab


def uses_kit_loader() -> bool:
    """Whether `build_c4_dataloader` is the kit's own. Only then do the `dataset` sections of the config apply."""
    return build_c4_dataloader is data_c4.build_c4_dataloader


def reads_kit_dataset(loader: Any) -> bool:
    """Whether this loader reads the kit's own dataset."""
    return isinstance(getattr(loader, 'dataset', None), (data_c4.StreamingC4, EvalView))


def gives_equal_batches(loader: Any) -> bool:
    """Whether every rank gets the same numbers of batches, samples and targets.

    True for packed tokens in the kit's own loader: a class or a `collate_fn` of your own may drop targets.
    """
    dataset = getattr(loader, 'dataset', None)
    return (type(dataset) is data_c4.StreamingC4 and uses_kit_loader() and dataset.column == 'tokens'
            and not dataset.sequence_ids)


def _kits_dataset(loader: Any) -> data_c4.StreamingC4:
    """The dataset of one of the kit's loaders, without the view that an evaluation puts around it."""
    return loader.dataset.dataset if isinstance(loader.dataset, EvalView) else loader.dataset


def build_data_spec(loader: Any, setting: str, model: ComposerCausalLM, seed: int) -> DataSpec:
    """Wraps a loader for the Trainer.

    `loader` is a DataLoader, or another iterable of batches that can be iterated many times. `setting` is
    `train_loader` or `eval_loader`. Batches are checked against the model's vocabulary and number of positions. `seed`
    seeds the sampling of a DataLoader that has no random generator of its own. Raises UserError if `loader` is not a
    loader, all ranks would read the same samples, or an evaluation loader can be read only once.
    """
    form = None
    if reads_kit_dataset(loader):
        check_vocab(_kits_dataset(loader), model.vocab_size)
    else:
        loader = _prepare_own_loader(loader, setting, seed)
        form = BatchChecker(setting, model.vocab_size, model.max_seq_len)
    count: Any = get_num_tokens_in_batch  # Composer's type says int, its code takes any number
    return DataSpec(loader, batch_transforms=form, split_batch=split_batch,
                    get_num_samples_in_batch=lambda batch: len(batch['input_ids']), get_num_tokens_in_batch=count)


def _prepare_own_loader(loader: Any, setting: str, seed: int) -> Any:
    """Checks the user's own loader, and wraps it in OrderedBatches if Composer cannot save its position."""
    ranks, evaluate = dist.get_world_size(), setting == 'eval_loader'
    if isinstance(loader, (Mapping, str)) or not (hasattr(loader, '__iter__') or hasattr(loader, '__getitem__')):
        raise UserError(f'{setting}: build_c4_dataloader returned a {type(loader).__name__}; have it return one '
                        'DataLoader, a list of batches, or an object whose __iter__ begins again')
    if evaluate and isinstance(loader, Iterator):
        raise UserError(f'eval_loader: a {type(loader).__name__} can be read only once, and each evaluation reads the '
                        'loader again; give a DataLoader, a list, or an object whose __iter__ begins again')
    if isinstance(loader, DataLoader):
        if loader.generator is None:
            loader.generator = torch.Generator().manual_seed(seed + dist.get_global_rank())
        if ranks > 1 and type(find_sampler(loader)) in (SequentialSampler, RandomSampler):
            raise UserError(f'{setting}: the DataLoader has no DistributedSampler, so each of {ranks} ranks would read '
                            'the same samples; give it sampler=composer.utils.dist.get_sampler(dataset, shuffle=True). '
                            'If the dataset already holds only the samples of its rank, make it an IterableDataset, or '
                            'use a sampler class of your own, as `class Mine(torch.utils.data.RandomSampler): pass`')
    # With a DistributedSampler, Composer leaves out the samples that come twice in an evaluation.
    drops_repeated = isinstance(loader, DataLoader) and any(
        isinstance(sampler, DistributedSampler) for sampler in (loader.batch_sampler, loader.sampler))
    if evaluate and drops_repeated or can_save_place(loader):
        return loader
    length = count_batches(loader)
    if not evaluate:  # the learning-rate schedule needs one length on all ranks
        lengths: list[Any] = dist.all_gather_object(length)
        length = None if None in lengths else min(lengths)
    return OrderedBatches(loader, evaluate) if length is None else SizedBatches(loader, evaluate, length)


def resumes_by_samples(loader: Any) -> bool:
    """Whether a resumed run continues at a number of samples, and not at a number of batches."""
    return isinstance(loader, DataLoader) and hasattr(loader.dataset, 'load_state_dict')


def fingerprints(train: Optional[DataSpec], evals: Optional[DataSpec]) -> dict[str, str]:
    """The fingerprints of the kit's datasets, by setting. Ranks that read the same data have equal fingerprints."""
    loaders: dict[str, Any] = {'train_loader': train and train.dataloader, 'eval_loader': evals and evals.dataloader}
    return {f'{name}.dataset': _kits_dataset(loader).fingerprint for name, loader in loaders.items()
            if reads_kit_dataset(loader)}


def check_train_loader(c: Config, loader: Any) -> None:
    """Raises UserError if a setting needs the length of an epoch or the size of a batch, and the loader has none."""
    for setting, time in (('max_duration', c.max_duration), ('scheduler.t_warmup', c.scheduler.t_warmup),
                          ('scheduler.t_max', c.scheduler.t_max)):
        if time.endswith('ep') and count_batches(loader) is None:
            raise UserError(f'{setting}: {time!r}, but the train loader, {describe_loader(loader)}, does not say how '
                            'many batches an epoch has; give batches (ba) or tokens (tok)')
    if c.device_train_microbatch_size == 'auto' and getattr(loader, 'batch_size', None) is None:
        raise UserError("device_train_microbatch_size: 'auto' begins with the batch_size of the train loader, and "
                        f'{describe_loader(loader)} has none; set a number')


def check_first_batch(spec: DataSpec) -> None:
    """Reads the first batch of the user's own evaluation loader now, because the first evaluation may be hours away.

    Raises UserError if there is no batch, or the model cannot read it.
    """
    if reads_kit_dataset(spec.dataloader):
        return
    batch = next(iter(spec.dataloader), None)
    if batch is None:
        raise UserError('eval_loader: the loader gave no batch, so there is nothing to evaluate; give at least one')
    spec.batch_transforms(batch)


def describe(loader: Any) -> list[str]:
    """Lines for the plan about the user's own loader, or about text that is packed on the fly."""
    dataset = getattr(loader, 'dataset', None)
    if getattr(dataset, 'packs_on_the_fly', False):
        return ['data: text is packed on the fly, so the samples depend on the number of ranks and workers, and a '
                'resumed run reads its epoch again up to the checkpoint. Packed tokens avoid both (convert_c4.py '
                '--concat_tokens)']
    if reads_kit_dataset(loader):
        return []
    length, ranks = count_batches(loader), dist.get_world_size()
    number = 'an unknown number of' if length is None else length
    resumed = 'reads its epoch again up to the checkpoint'
    if resumes_by_samples(loader):
        resumed = 'continues at the next sample'
    lines = [f'data: a loader of your own, {describe_loader(loader)}, with {number} batches in an epoch; a resumed run '
             f'{resumed}']
    own = unwrap_loader(loader)
    if ranks > 1 and not (isinstance(own, DataLoader) and isinstance(find_sampler(own), DistributedSampler)):
        lines.append(f'data: no DistributedSampler divides the samples among {ranks} ranks. If your loader does not '
                     'divide them either, each rank trains on the same samples')
    return lines

"""What the Trainer is given of a loader: the kit's own, or any other whose batches are dicts of token ids."""

import inspect
import logging
from collections.abc import Iterator, Mapping
from typing import Any, Optional

import numpy as np
import torch
from composer.core import DataSpec
from composer.utils import dist
from torch import Tensor
from torch.utils import data
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from src import data_c4
from src.causal_lm import ComposerCausalLM
from src.common.errors import UserError
from src.common.targets import IGNORE, get_num_tokens_in_batch, targets_per_sample
from src.config.schema import Config
from src.data_c4 import EvalView, StreamingC4, build_c4_dataloader
from src.tokenizer import check_vocab

log = logging.getLogger('src')
TORCHS = (data.RandomSampler, data.SubsetRandomSampler, data.WeightedRandomSampler)  # that shuffle
KEYS = ('input_ids', 'labels', 'attention_mask', 'sequence_id')  # that models read; others are handed on


def has_kits_loader() -> bool:
    """Whether `build_c4_dataloader` is the kit's own: then the config's sections `dataset` say what is read."""
    return build_c4_dataloader is data_c4.build_c4_dataloader


def build_data_spec(loader: Any, setting: str, model: ComposerCausalLM, seed: int) -> DataSpec:
    """Wraps a loader for the Trainer.

    Args:
        loader: A DataLoader, or another iterable of batches that begins anew each time that it is iterated.
        setting: `train_loader` or `eval_loader`, for messages.
        model: Its vocabulary and its positions bound the batches.
        seed: Of the order of a DataLoader that has no random generator of its own.

    Raises:
        UserError: It is no loader, all ranks would read the same samples, or the batches can be read only once.
    """
    ranks, evaluate = dist.get_world_size(), setting == 'eval_loader'
    if isinstance(loader, (Mapping, str)) or not (hasattr(loader, '__iter__') or hasattr(loader, '__getitem__')):
        raise UserError(f'{setting}: build_c4_dataloader returned a {type(loader).__name__}; have it return one '
                        'DataLoader, a list of batches, or an object whose __iter__ begins anew')
    if is_kits(loader):
        check_vocab(getattr(loader.dataset, 'dataset', loader.dataset), model.vocab_size)
    if evaluate and isinstance(loader, Iterator):
        raise UserError(f'eval_loader: a {type(loader).__name__} can be read only once, and each evaluation reads the '
                        'loader anew; give a DataLoader, a list, or an object whose __iter__ begins anew')
    if isinstance(loader, DataLoader) and loader.generator is None:
        loader.generator = torch.Generator().manual_seed(seed + dist.get_global_rank())
    if (ranks > 1 and isinstance(loader, DataLoader) and not is_kits(loader)
            and type(_order(loader)) in (data.SequentialSampler, data.RandomSampler)):
        raise UserError(f'{setting}: the DataLoader has no DistributedSampler, so each of {ranks} ranks would read the '
                        'same samples; give it sampler=composer.utils.dist.get_sampler(dataset, shuffle=True). Where '
                        'the dataset is already cut for each rank, make it an IterableDataset, or give it a sampler of '
                        'a class of your own, as `class Mine(torch.utils.data.RandomSampler): pass`')
    if not is_kits(loader) and not (evaluate and _composers(loader) or _resumes(loader)):
        length = epoch_length(loader)
        if not evaluate:  # ranks that disagree would have other learning rates
            lengths: list[Any] = dist.all_gather_object(length)
            length = None if None in lengths else min(lengths)
        loader = Batches(loader, evaluate) if length is None else SizedBatches(loader, evaluate, length)
    count: Any = get_num_tokens_in_batch  # Composer's type says int, its code takes any number
    form = None if is_kits(loader) else BatchForm(setting, model.vocab_size, model.max_seq_len)
    return DataSpec(loader, batch_transforms=form, split_batch=split,
                    get_num_samples_in_batch=lambda batch: len(batch['input_ids']), get_num_tokens_in_batch=count)


class Batches:
    """The batches of a loader of the user's own, in an order that depends on the number of the epoch alone.

    A resumed run begins each epoch that is over, reads a batch of it, and so comes to its own epoch; PyTorch's samplers
    draw more random numbers in a whole epoch. Every evaluation has the order of epoch 0. Composer sees no more than the
    batches: it would call `state_dict` of any dataset in a form that other libraries do not have.
    """

    def __init__(self, loader: Any, evaluate: bool = False) -> None:
        self.loader, self._evaluate, self._epoch = loader, evaluate, 0
        batches = getattr(loader, 'batch_sampler', None)
        samplers: list[Any] = [getattr(loader, 'sampler', None), batches, getattr(batches, 'sampler', None)]
        for sampler in samplers:
            if isinstance(sampler, TORCHS) and sampler.generator is None:
                sampler.generator = getattr(loader, 'generator', None)
        generators = {part.generator for part in (loader, *samplers)
                      if isinstance(getattr(part, 'generator', None), torch.Generator)}
        self._seeds = [(generator, generator.initial_seed()) for generator in generators]
        parts: dict[int, Any] = {id(part): part for part in (loader, getattr(loader, 'dataset', None), *samplers)}
        self._told = [part for part in parts.values() if hasattr(part, 'set_epoch')]

    def __iter__(self) -> Iterator[Any]:
        for generator, seed in self._seeds:
            generator.manual_seed(seed + self._epoch * dist.get_world_size())
        for part in self._told:
            part.set_epoch(self._epoch)
        self._epoch += not self._evaluate
        return iter(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == 'loader' or name.startswith('__'):  # of a copy that is not filled yet, or Python's own
            raise AttributeError(name)
        return getattr(self.loader, name)  # callbacks ask for `dataset`, `batch_size` and others


class SizedBatches(Batches):
    """Batches that are counted. Composer refuses an evaluation whose `len` raises TypeError, as a DataLoader's may.

    Args:
        length: Batches in an epoch; in training those of the rank that has the fewest.
    """

    def __init__(self, loader: Any, evaluate: bool, length: int) -> None:
        super().__init__(loader, evaluate)
        self._length = length

    def __len__(self) -> int:
        return self._length


def _resumes(loader: Any) -> bool:
    """Whether Composer can save the place in a loader's dataset, which streaming's have."""
    if not (isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset)):
        return False
    try:
        state_dict: Any = loader.dataset.state_dict  # pyright: ignore
        inspect.signature(state_dict).bind(num_samples=0, from_beginning=True)
    except (AttributeError, TypeError):
        return False
    return True


def _order(loader: DataLoader) -> Any:
    """What gives the numbers of the samples, in PyTorch's own batches or in others."""
    order = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    return order.sampler if type(order) is data.BatchSampler else order


def _composers(loader: Any) -> bool:
    """Whether Composer knows the sampler: an evaluation then leaves out samples that come twice."""
    return isinstance(loader, DataLoader) and any(
        isinstance(sampler, DistributedSampler) for sampler in (loader.batch_sampler, loader.sampler))


def epoch_length(loader: Any) -> Optional[int]:
    """Batches in an epoch; None: nobody knows."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _given(loader: Any) -> Any:
    return loader.loader if isinstance(loader, Batches) else loader


def _name(loader: Any) -> str:
    loader = _given(loader)
    of = f' of {type(loader.dataset).__name__}' if isinstance(loader, DataLoader) else ''
    return f'{type(loader).__name__}{of}'


# ---------------------------------------------------------------- what a run asks of a loader


def is_kits(loader: Any) -> bool:
    """Whether a loader reads the kit's own dataset."""
    return isinstance(getattr(loader, 'dataset', None), (StreamingC4, EvalView))


def counts_samples(loader: Any) -> bool:
    """Whether a resumed run goes on from a number of samples, and not from a number of batches."""
    return isinstance(loader, DataLoader) and hasattr(loader.dataset, 'load_state_dict')


def fingerprints(train: Optional[DataSpec], evals: Optional[DataSpec]) -> dict[str, str]:
    """The fingerprints of the kit's datasets, by setting: ranks that read the same data have the same."""
    loaders: dict[str, Any] = {'train_loader': train and train.dataloader, 'eval_loader': evals and evals.dataloader}
    return {f'{name}.dataset': loader.dataset.fingerprint for name, loader in loaders.items() if is_kits(loader)}


def check_train_loader(c: Config, loader: Any) -> None:
    """Holds the settings that need an epoch's length, or a batch's size, against a loader that may know neither.

    Raises:
        UserError: The loader does not have what a setting needs.
    """
    for setting, time in (('max_duration', c.max_duration), ('scheduler.t_warmup', c.scheduler.t_warmup),
                          ('scheduler.t_max', c.scheduler.t_max)):
        if time.endswith('ep') and epoch_length(loader) is None:
            raise UserError(f'{setting}: {time!r}, but the train loader, {_name(loader)}, does not say how many '
                            'batches an epoch has; give batches (ba) or tokens (tok)')
    if c.device_train_microbatch_size == 'auto' and getattr(loader, 'batch_size', None) is None:
        raise UserError("device_train_microbatch_size: 'auto' begins with the batch_size of the train loader, and "
                        f'{_name(loader)} has none; set a number')


def check_first_batch(spec: DataSpec) -> None:
    """Reads a batch of an evaluation that the user's own loader gives: the first evaluation may be hours away.

    Raises:
        UserError: There is none, or the model does not take it.
    """
    if is_kits(spec.dataloader):
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
    if is_kits(loader):
        return []
    length, ranks = epoch_length(loader), dist.get_world_size()
    number = 'an unknown number of' if length is None else length
    resumed = 'first reads again what its epoch has read'
    if counts_samples(loader):
        resumed = 'goes on from a number of samples'
    lines = [f'data: a loader of your own, {_name(loader)}, with {number} batches in an epoch; a resumed run '
             f'{resumed}']
    given = _given(loader)
    if ranks > 1 and not (isinstance(given, DataLoader) and isinstance(_order(given), DistributedSampler)):
        lines.append(f'data: no DistributedSampler divides the samples among {ranks} ranks: where the loader does not '
                     'do that itself, each rank trains on the same samples')
    return lines


# ---------------------------------------------------------------- one batch


class BatchForm:
    """Checks a batch and completes it, before it is split into microbatches: DataSpec's `batch_transforms`.

    Token ids become int64. `labels` that are missing are the `input_ids`; labels of padding become -100. Other keys
    stay. The kit's own loaders give batches in this form.

    Args:
        setting: The loader, for messages.
        vocab_size: Of the model.
        max_seq_len: The longest sequence that the model takes; None: any.
    """

    def __init__(self, setting: str, vocab_size: int, max_seq_len: Optional[int]) -> None:
        self.setting, self.vocab_size, self.max_seq_len = setting, vocab_size, max_seq_len
        self._said = False

    def __call__(self, batch: Any) -> dict[str, Any]:
        given = dict(batch) if isinstance(batch, Mapping) else {}
        if 'input_ids' not in given:
            is_dict = isinstance(batch, Mapping)
            this = f'has the keys {", ".join(map(str, given))}' if is_dict else f'is a {type(batch).__name__}'
            raise UserError(f'{self.setting}: a batch must be a dict with input_ids, and this one {this}')
        if 'labels' not in given and not self._said:
            self._said = True
            log.info('%s: its batches have no labels, so every token of input_ids but padding is predicted',
                     self.setting)
        given.setdefault('labels', given['input_ids'])
        ids = {key: self._ids(key, given[key]) for key in KEYS if key in given}
        self._check(ids)
        if (mask := ids.get('attention_mask')) is not None:
            ids['labels'] = ids['labels'].masked_fill(mask == 0, IGNORE)
        return {**given, **ids, 'n_targets': targets_per_sample(ids)}

    def _ids(self, key: str, value: Any) -> Tensor:
        tensor = value
        if isinstance(value, np.ndarray) and value.dtype.kind in ('iubf' if key == 'attention_mask' else 'iu'):
            tensor = torch.from_numpy(value.astype(np.int64))  # of either byte order
        if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.numel():
            whole = not tensor.is_floating_point() and tensor.dtype != torch.bool
            if whole or key == 'attention_mask':
                return tensor.long()
        this = f'a {type(value).__name__}'
        if isinstance(value, (Tensor, np.ndarray)):
            this = f'{value.dtype} of shape {tuple(value.shape)}'
        raise UserError(f'{self.setting}: {key} of a batch must be whole numbers in a tensor of shape (batch, seq), '
                        f'and is {this}; have the dataset give each sample as tensors, not as lists')

    def _check(self, ids: dict[str, Tensor]) -> None:
        """Raises a UserError where the tensors do not fit each other or the model."""
        rows, seq_len = ids['input_ids'].shape
        if self.max_seq_len and seq_len > self.max_seq_len:
            raise UserError(f'{self.setting}: input_ids have {seq_len} tokens in a row, and the model has positions '
                            f'for {self.max_seq_len}; give shorter rows, or set max_seq_len')
        longer = [(rows, seq_len + 1)] if 'attention_mask' not in ids else []
        for key, tensor in ids.items():
            allowed = [(rows, seq_len), *(longer if key == 'labels' else [])]
            if tuple(tensor.shape) not in allowed:
                raise UserError(f'{self.setting}: {key} of shape {tuple(tensor.shape)} do not go with input_ids of '
                                f'shape {(rows, seq_len)}; they must have {" or ".join(map(str, allowed))}')
        for key in ('input_ids', 'labels'):
            wrong = (ids[key] < 0) | (ids[key] >= self.vocab_size)
            if key == 'labels':
                wrong &= ids[key] != IGNORE
            if wrong.any():
                raise UserError(f'{self.setting}: {key} hold {int(ids[key][wrong][0])}, and the model has the token '
                                f'ids 0 to {self.vocab_size - 1} (labels also {IGNORE}); set a larger vocabulary in '
                                'section model, or give ids of another tokenizer')
        mask = ids.get('attention_mask')
        if mask is not None and not ((mask == 0) | (mask == 1)).all():
            raise UserError(f'{self.setting}: attention_mask must be 1 at tokens and 0 at padding, and holds '
                            f'{int(mask.min())} and {int(mask.max())}')


def split(batch: Mapping[str, Any], size: Any) -> list[dict[str, Any]]:
    """Microbatches of `size` samples; the last may have fewer. What is not one value for each sample goes to all."""
    rows = len(batch['input_ids'])
    divided = {key for key, value in batch.items() if _per_sample(value, rows)}
    return [{key: value[start:start + size] if key in divided else value for key, value in batch.items()}
            for start in range(0, rows, size)]


def _per_sample(value: Any, rows: int) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim > 0 and len(value) == rows
    return isinstance(value, (list, tuple)) and len(value) == rows

"""What `main.py YAML --dry_run` says, in place of training: the config, an estimate for this machine, the first batch."""

import importlib.util
from typing import Any

import psutil
import torch
import yaml
from composer.core import DataSpec
from composer.utils import dist

from src.callbacks.metrics import NO_BATCH
from src.common.errors import UserError
from src.config import load as config
from src.config.schema import Config
from src.sizing.cards import Card, estimate
from src.tools.estimate import report
from src.training import plugins

MAKE_EXPERIMENTS = ('cometml', 'mlflow')  # loggers that write as soon as they are made
SHOWN = 300  # characters of the first sample


def config_text(c: Config) -> str:
    """The config as it is used, defaults and command line included, secrets masked."""
    text = yaml.safe_dump(config.masked(config.plain(c)), sort_keys=False, width=120, allow_unicode=True)
    return f'dry run: nothing is trained, saved or logged\nconfig:\n{_indented(text)}'


def check_plugins(c: Config, tokenizer: Any) -> None:
    """Builds the callbacks and loggers, which a dry run leaves out, as far as that writes nothing.

    Raises:
        UserError: One of them cannot be built.
    """
    plugins.build_callbacks(c, tokenizer)
    plugins.build_all('loggers', {name: kwargs for name, kwargs in c.loggers.items() if name not in MAKE_EXPERIMENTS})
    for name in MAKE_EXPERIMENTS:
        if c.loggers.get(name, False) is not False and importlib.util.find_spec(plugins.PACKAGES[name]) is None:
            plugins.build_all('loggers', {name: c.loggers[name]})  # which says so


def this_machine() -> Card:
    """A device of this run: rank 0's GPU, or a rank's part of the memory that a CPU has."""
    if torch.cuda.is_available():
        return Card(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name())
    return Card('CPU', psutil.virtual_memory().total / dist.get_local_world_size(), 'CPU', is_gpu=False)


def rehearsal(c: Config, train: DataSpec, tokenizer: Any) -> str:
    """The estimate for as many devices as there are, and the first batch; every rank must call this, as they share the data.

    Args:
        c: The config as it was given.
        train: The loader of training.
        tokenizer: Hugging Face's own; None: the ids are shown alone.

    Raises:
        UserError: There is no batch, or it cannot be trained on.
    """
    batch = next(iter(train.dataloader), None)
    if batch is None:
        raise UserError(NO_BATCH)
    try:
        estimated = report(estimate(c, this_machine(), dist.get_world_size()))
    except UserError as e:  # its step cannot run without data; it trains all the same
        estimated = str(e)
    first = _described(train.batch_transforms(batch), tokenizer)
    return f'estimate:\n{_indented(estimated)}\n{first}\ndry run: all is well'


def _described(batch: dict[str, Any], tokenizer: Any) -> str:
    shapes = ', '.join(f'{key} {tuple(value.shape)}' for key, value in batch.items() if isinstance(value, torch.Tensor))
    ids = batch['input_ids'][0]
    if 'attention_mask' in batch:
        ids = ids[batch['attention_mask'][0].bool()]
    said = f'first batch of rank 0: {shapes}; {sum(batch["n_targets"])} targets\n  first sample, {len(ids)} tokens: '
    if tokenizer is None:
        return f'{said}{" ".join(map(str, ids[:8].tolist()))} ...'
    text = tokenizer.decode(ids)
    pieces = ' '.join(f'{int(i)}={tokenizer.decode([i])!r}' for i in ids[:8])
    rest = f' and {len(text) - SHOWN:,} characters more' if len(text) > SHOWN else ''
    return f'{said}{pieces} ...\n  text: {text[:SHOWN]!r}{rest}'


def _indented(text: str) -> str:
    return '\n'.join(f'  {line}' for line in text.splitlines())

"""Trains the model of a prepared run; a dry run prints an estimate and the first batch instead."""

import logging
import textwrap
import time
from collections.abc import Sequence
from typing import Any, Optional

import psutil
import torch
from composer import Trainer
from composer.core import DataSpec
from composer.utils import dist

from src.callbacks.metrics import NO_FULL_BATCH
from src.causal_lm import ComposerCausalLM
from src.checkpoints.writer import CheckpointWriter
from src.common.errors import UserError, mask_secrets
from src.common.flops import Card, peak_flops
from src.config import load
from src.config.schema import Config
from src.ranks.stop import Stopped
from src.sizing.estimate import estimate
from src.sizing.report import report
from src.tokenizer import HFTokenizer
from src.training import sharding
from src.training.failures import explain_run_failures
from src.training.report import environment, plan, summary
from src.training.setup import Setup

log = logging.getLogger('src')
MAX_TEXT = 300  # characters of the first sample that a dry run shows


def log_start(run: Setup, trainer: Trainer, model: ComposerCausalLM, train: DataSpec, changed: Sequence[str]) -> None:
    """Sends the config to the loggers and prints the plan."""
    trainer.logger.log_hyperparameters({**mask_secrets(load.to_plain(run.c)), 'environment': environment(run.c, model)})
    log.info('%s', plan(run, model, train.dataloader, changed))


def fit(run: Setup, trainer: Trainer, train: DataSpec, writer: Optional[CheckpointWriter],
        tokenizer: Optional[HFTokenizer]) -> None:
    """Trains to `max_duration`, with an evaluation first if `eval_first` is true, and prints the summary.

    Raises:
        Stopped: SIGTERM or SIGINT arrived; the current batch is finished and saved.
        UserError: The run cannot continue; the message names the last whole checkpoint.
    """
    c, state = run.c, trainer.state
    if run.dry_run:
        log.info('%s', describe_dry_run(run.user_config, train, tokenizer and tokenizer.tokenizer))
    elif state.max_duration is not None and state.timestamp >= state.max_duration:
        log.info('nothing to do: the checkpoint has already reached max_duration %s; set a longer one to continue',
                 c.max_duration)
    else:
        sharding.average_gradients(state.model)
        started = time.monotonic()
        with run.stop, explain_run_failures(c, writer):
            try:
                if writer:
                    writer.check(state)
                if c.eval_first and c.eval_loader and run.start.kind != 'resume':
                    trainer.eval()
                trainer.fit()
            except Stopped:
                trainer.engine.close()  # closes every logger
                raise
        log.info('%s', summary(trainer, c, writer.newest if writer else None, time.monotonic() - started))


# ---------------------------------------------------------------- dry run
def this_device() -> Card:
    """A device of this run: the GPU of rank 0, or a CPU with this rank's share of the memory."""
    if torch.cuda.is_available():
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
        return Card(name, memory, peak_flops(name, 'amp_bf16'))
    return Card('CPU', psutil.virtual_memory().total / dist.get_local_world_size(), None, is_gpu=False)


def describe_dry_run(c: Config, train: DataSpec, tokenizer: Any) -> str:
    """The estimate for the devices of this run, and the first batch. All ranks must call this.

    `c` is the user's config. `tokenizer` is a Hugging Face tokenizer, or None to show token ids without text. Raises
    UserError if there is no batch, or the model cannot train on it.
    """
    batch = next(iter(train.dataloader), None)
    if batch is None:
        raise UserError(NO_FULL_BATCH)
    try:
        estimated = report(estimate(c, this_device(), dist.get_world_size()))
    except UserError as e:  # no estimate, because the model cannot run without data; it can still train
        estimated = str(e)
    first = _describe_batch(train.batch_transforms(batch), tokenizer)
    return f'estimate:\n{textwrap.indent(estimated, "  ")}\n{first}\ndry run: all is well'


def _describe_batch(batch: dict[str, Any], tokenizer: Any) -> str:
    shapes = ', '.join(f'{key} {tuple(value.shape)}' for key, value in batch.items() if isinstance(value, torch.Tensor))
    ids = batch['input_ids'][0]
    if 'attention_mask' in batch:
        ids = ids[batch['attention_mask'][0].bool()]
    line = f'first batch of rank 0: {shapes}; {sum(batch["n_targets"])} targets\n  first sample, {len(ids)} tokens: '
    if tokenizer is None:
        return f'{line}{" ".join(map(str, ids[:8].tolist()))} ...'
    text = tokenizer.decode(ids)
    pieces = ' '.join(f'{int(i)}={tokenizer.decode([i])!r}' for i in ids[:8])
    rest = f' and {len(text) - MAX_TEXT:,} more characters' if len(text) > MAX_TEXT else ''
    return f'{line}{pieces} ...\n  text: {text[:MAX_TEXT]!r}{rest}'

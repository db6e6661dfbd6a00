"""Describes a run: the plan before training, its environment, and the summary at the end."""

import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Optional

import torch
from composer import Trainer
from composer.utils import dist

from src.callbacks.metrics import UnigramBaseline
from src.causal_lm import ComposerCausalLM
from src.common.flops import train_flops_per_token
from src.config.derived import fsdp_version, grad_accum
from src.config.schema import Config
from src.training import data
from src.training.setup import Setup


def plan(run: Setup, model: ComposerCausalLM, train_loader: Any, changed: Sequence[str] = ()) -> str:
    """The lines that a run prints before training: the quantities that follow from the config, and `changed` lines."""
    c = run.c
    seq_len = c.train_loader.dataset.max_seq_len
    tokens = c.global_train_batch_size * seq_len
    lines = [f'model: {c.model.name}, {model.n_params:,} parameters',
             f'batch: {c.global_train_batch_size} samples of {seq_len} tokens = {tokens:,} tokens per step; '
             f'{_microbatches(run)}',
             f'precision: {run.precision.value}; duration: {c.max_duration}']
    if c.max_duration.endswith('ba'):
        total = tokens * int(c.max_duration[:-2].replace('_', ''))
        lines.append(f'tokens: {total:,} in the whole run, {total / model.n_params:.1f} per parameter')
    lines.append(f'sharding: {describe_sharding(c)}')
    return '\n'.join([*lines, *data.describe(train_loader), f'start: {run.start}', *changed])


def _microbatches(run: Setup) -> str:
    devices = dist.get_world_size()
    each = 'the device computes' if devices == 1 else f'each of {devices} devices computes'
    if not isinstance(run.microbatch, int):
        return f'{each} microbatches of the largest size that fits (auto)'
    n = grad_accum(run.device_batch, run.microbatch)
    size = f'{"up to " * (run.device_batch % run.microbatch > 0)}{run.microbatch}'
    return f'{each} {n} microbatch{"es" * (n > 1)} of {size} sample{"s" * (run.microbatch > 1)}'


def environment(c: Config, model: ComposerCausalLM) -> dict[str, Any]:
    """The facts about a run that its config does not hold, for the loggers: model size, devices, versions, commit."""
    git = ['git', '-C', str(Path(__file__).parent), 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*']
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):  # git is not installed, or hangs
        commit = ''
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {'n_params': model.n_params,
            'flops_per_token': train_flops_per_token(model.n_params, model.n_layers, model.d_model,
                                                     c.train_loader.dataset.max_seq_len),
            'devices': dist.get_world_size(), 'nodes': dist.get_world_size() // dist.get_local_world_size(),
            'device': gpu or f'CPU ({platform.machine()}), {torch.get_num_threads()} threads each',
            'python': platform.python_version(), 'git_commit': commit or None,
            **{name: version(name) for name in ('torch', 'mosaicml', 'mosaicml-streaming', 'transformers')}}


def describe_sharding(c: Config) -> str:
    f, world_size = c.fsdp_config, dist.get_world_size()
    version = fsdp_version(f, torch.cuda.is_available())
    if f is None or version == 0:
        return ('none, one device holds the whole model' if world_size == 1 else
                f'none, each of {world_size} devices holds the whole model (DDP)')
    text = (f'FSDP{version} {f.sharding_strategy} on {world_size} device{"s" * (world_size > 1)}, {f.state_dict_type} '
            'checkpoints')
    unused = {'backward_prefetch', 'backward_prefetch_limit', 'forward_prefetch', 'forward_prefetch_limit',
              'limit_all_gathers', 'keep_low_precision_grads', 'sync_module_states', 'use_orig_params',
              'activation_checkpointing_reentrant'}
    ignored = [key for key in sorted(unused & f.model_fields_set)
               if getattr(f, key) != type(f).model_fields[key].default]
    return text + (f'; without effect in FSDP2: {", ".join(ignored)}' if version == 2 and ignored else '')


def summary(trainer: Trainer, c: Config, checkpoint: Optional[str], seconds: float) -> str:
    """The lines that a run prints when it ends; `seconds` is the duration of this start."""
    state = trainer.state
    train = float(state.train_metric_values.get('LanguageCrossEntropy', float('nan')))
    tokens = int(state.timestamp.token)
    evaluated = ', evaluation included' if c.eval_loader else ''
    lines = ['', '=' * 72, f'run {state.run_name}: {int(state.timestamp.batch)} batches, {tokens:,} tokens trained on; '
             f'this start took {seconds:.0f} s{evaluated}', f'  train loss     {train:.4f} (last batch)']
    if c.eval_loader:
        loss = float(state.eval_metric_values['LanguageCrossEntropy'])
        lines.append(f'  eval loss      {loss:.4f}   perplexity {float(state.eval_metric_values["Perplexity"]):.2f}')
        lines += [f'  unigram        {callback.entropy:.4f}   the eval loss of the best model that ignores context'
                  for callback in state.callbacks if isinstance(callback, UnigramBaseline) and callback.entropy]
    train_seconds = state.timestamp.total_wct.total_seconds()
    lines.append(f'  throughput     {tokens / max(train_seconds, 1e-9):,.0f} tokens/s in training')
    family = 'modern_gpt' if c.model.name == 'modern_gpt' else 'mosaic_gpt'
    lines += [f'  checkpoint     {checkpoint or "none (to save checkpoints, set save_folder)"}',
              'next: train longer (max_duration=...), use your own data (python convert_c4.py --help),',
              f'      or train a larger model (composer main.py yamls/{family}/125m.yaml)', '=' * 72]
    return '\n'.join(lines)

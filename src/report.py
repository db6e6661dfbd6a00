"""What a run says of itself: its plan before training, its summary after."""

import logging
from typing import Any, Optional

import torch
from composer import Trainer
from composer.utils import dist

from src.batch_size import grad_accum
from src.callbacks import UnigramBaseline
from src.causal_lm import ComposerCausalLM
from src.schema import TIME, Config

log = logging.getLogger('src')


def log_to_stderr() -> None:
    """Shows the kit's own messages, once: on rank 0."""
    if not log.handlers:
        log.addHandler(logging.StreamHandler() if dist.get_global_rank() == 0 else logging.NullHandler())
        log.setLevel(logging.INFO)
        log.propagate = False


def plan(c: Config, model: ComposerCausalLM, device_batch: int, microbatch: Any, precision: str) -> str:
    """Every quantity that follows from the config, printed once before training."""
    accum = grad_accum(device_batch, microbatch) if isinstance(microbatch, int) else 'auto'
    tokens = c.global_train_batch_size * c.max_seq_len
    lines = [f'model: {c.model.name}, {model.n_params:,} parameters',
             f'batch: {c.global_train_batch_size} samples of {c.max_seq_len} tokens = {tokens:,} tokens per step; '
             f'{dist.get_world_size()} devices x {accum} microbatches of {microbatch}',
             f'precision: {precision}; duration: {c.max_duration}']
    if c.max_duration.endswith('ba'):
        total = tokens * int(c.max_duration[:-2].replace('_', ''))
        lines.append(f'tokens: {total:,} in all, {total / model.n_params:.1f} per parameter')
    duration, warmup = TIME.match(c.max_duration), TIME.match(c.scheduler.t_warmup)
    if duration and warmup and duration[2] == warmup[2] and float(warmup[1]) >= float(duration[1]):
        lines.append(f'scheduler.t_warmup: {c.scheduler.t_warmup} is not shorter than the run, which ends before the peak rate')
    if c.fsdp_config and not torch.cuda.is_available():
        lines.append('fsdp_config: not used on CPU; several ranks hold one copy each (DDP), with the same maths')
    return '\n'.join(lines)


def summary(trainer: Trainer, c: Config, seconds: float) -> str:
    """What a finished run came to."""
    state = trainer.state
    train = float(state.train_metric_values.get('LanguageCrossEntropy', float('nan')))
    lines = ['', '=' * 72, f'run {state.run_name}: {int(state.timestamp.batch)} batches, '
             f'{int(state.timestamp.token):,} tokens trained on in {seconds:.0f} s with evaluation',
             f'  train loss     {train:.4f} (last batch)']
    if c.eval_loader:
        loss = float(state.eval_metric_values['LanguageCrossEntropy'])
        lines.append(f'  eval loss      {loss:.4f}   perplexity {float(state.eval_metric_values["Perplexity"]):.2f}')
        baseline: Optional[UnigramBaseline] = next((cb for cb in state.callbacks if isinstance(cb, UnigramBaseline)), None)
        if baseline and baseline.entropy:
            lines.append(f'  unigram        {baseline.entropy:.4f}   the eval loss of the best model that ignores context')
    train_seconds = state.timestamp.total_wct.total_seconds()
    lines.append(f'  throughput     {int(state.timestamp.token) / max(train_seconds, 1e-9):,.0f} tokens/s in training')
    saved = trainer.saved_checkpoints[-1] if trainer.saved_checkpoints else 'none (set save_folder)'
    lines += [f'  checkpoint     {saved}', 'next: train longer (max_duration=...), your own data (python convert_c4.py --help),',
              '      or a larger model: composer main.py yamls/mosaic_gpt/125m.yaml', '=' * 72]
    return '\n'.join(lines)

"""YAML in, trained model out.

    composer main.py yamls/quickstart.yaml [key=value ...]

`main` reads as the list of what a run consists of; each part is built in `src/`.
"""

import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Optional

import torch
from composer import Trainer
from composer.core import DataSpec, Evaluator
from composer.utils import dist, get_device, reproducibility
from omegaconf import DictConfig

from src import builders, config
from src.batch_size import device_batch_size, grad_accum, microbatch_size
from src.callbacks import StepCounters, UnigramBaseline
from src.causal_lm import ComposerCausalLM
from src.data_c4 import build_c4_dataloader, get_num_tokens_in_batch
from src.errors import UserError
from src.model_registry import COMPOSER_MODEL_REGISTRY
from src.schema import Config
from src.tokenizer import TOKENIZER_REGISTRY, check_vocab

log = logging.getLogger('src')


def main(cfg: DictConfig) -> Trainer:
    """Trains one model.

    Args:
        cfg: A config as in `yamls/`, interpolations allowed.

    Returns:
        The Trainer, after `fit`.

    Raises:
        UserError: Everything in the config or the data that the user can mend.
    """
    has_gpu, world_size = torch.cuda.is_available(), dist.get_world_size()
    c = config.check(cfg, builders.REGISTRIES, world_size, has_gpu)
    if dist.get_global_rank() == 0:
        log_to_stderr()

    # Sizes: the maths is the YAML's, the execution follows from the number of devices.
    device_batch = device_batch_size(c.global_train_batch_size, world_size)
    microbatch = c.device_train_microbatch_size
    if isinstance(microbatch, int):
        if microbatch > device_batch:
            log.warning('device_train_microbatch_size: %d is more than the %d samples that each of %d devices has; using %d',
                        microbatch, device_batch, world_size, device_batch)
        microbatch = microbatch_size(device_batch, microbatch)
    precision = builders.resolve_precision(c.precision, has_gpu)
    check_checkpoints(c)

    # Processes and seeds
    dist.initialize_dist(get_device(None), timeout=c.dist_timeout)
    reproducibility.seed_all(c.seed)

    # Model, on meta until it is sharded
    tokenizer = TOKENIZER_REGISTRY[c.tokenizer.name](c.tokenizer.tokenizer_name, c.tokenizer.max_seq_len)
    model = COMPOSER_MODEL_REGISTRY[c.model.name](c.model)
    check_vocab(tokenizer, model.vocab_size)
    check_seq_len(c, model)
    parallelism = {'fsdp': c.fsdp_config.model_dump()} if c.fsdp_config and has_gpu else None
    if parallelism is None and any(p.is_meta for p in model.parameters()):
        model.model.materialize('cpu')

    # Data
    count: Any = get_num_tokens_in_batch  # Composer's type says int, its code takes any number
    train_loader = DataSpec(build_c4_dataloader(c.train_loader, device_batch), get_num_tokens_in_batch=count)
    evaluators = []
    if c.eval_loader:
        eval_loader = build_c4_dataloader(c.eval_loader, c.device_eval_batch_size, evaluate=True)
        evaluators.append(Evaluator(label='eval', eval_interval=c.eval_interval,
                                    dataloader=DataSpec(eval_loader, get_num_tokens_in_batch=count)))

    # Everything else
    trainer = Trainer(
        model=model,
        train_dataloader=train_loader,
        eval_dataloader=evaluators,
        optimizers=builders.build_optimizer(c.optimizer, model.parameters()),
        schedulers=builders.build_scheduler(c.scheduler),
        algorithms=builders.build_all('algorithms', c.algorithms),
        callbacks=[StepCounters(), *builders.build_all('callbacks', c.callbacks)],
        loggers=builders.build_all('loggers', c.loggers),
        max_duration=c.max_duration,
        device_train_microbatch_size=microbatch,
        accumulate_train_batch_on_tokens=True,
        precision=precision,
        parallelism_config=parallelism,
        compile_config=c.compile_config,
        dist_timeout=c.dist_timeout,
        seed=c.seed,
        run_name=c.run_name,
        progress_bar=c.progress_bar and dist.get_global_rank() == 0,
        log_to_console=c.log_to_console and dist.get_global_rank() == 0,
        console_log_interval=c.console_log_interval,
        log_traces=c.log_traces,
        save_folder=c.save_folder,
        save_interval=c.save_interval,
        save_num_checkpoints_to_keep=c.save_num_checkpoints_to_keep,
        load_path=c.load_path,
        load_weights_only=c.load_weights_only,
        autoresume=c.autoresume,
    )
    trainer.logger.log_hyperparameters(config.masked(config.plain(c)))
    log.info('%s', plan(c, model, device_batch, microbatch, str(precision.value)))

    if c.eval_first and c.eval_loader:
        trainer.eval()
    started = time.monotonic()
    trainer.fit()
    log.info('%s', summary(trainer, c, time.monotonic() - started))
    return trainer


def log_to_stderr() -> None:
    """Shows the kit's own messages, once: this is called on rank 0."""
    if not log.handlers:
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)
        log.propagate = False


def check_checkpoints(c: Config) -> None:
    """Refuses to load from nothing, and to start a new run among the checkpoints of another."""
    if c.load_path and '://' not in c.load_path and not Path(c.load_path.replace('{rank}', '0')).exists():
        raise UserError(f'load_path: {c.load_path}: no such file')
    if c.save_folder is None or '://' in c.save_folder or c.autoresume or c.load_path:
        return
    run_name = c.run_name or os.environ.get('COMPOSER_RUN_NAME') or os.environ.get('RUN_NAME') or ''
    if '{run_name}' in c.save_folder and not run_name:
        return
    folder = Path(c.save_folder.replace('{run_name}', run_name))
    if any(folder.glob('ep*')):
        raise UserError(f'save_folder: {folder} already holds checkpoints. To go on from them set autoresume=true; '
                        'to start afresh set another run_name or save_folder, or move them away')


def check_seq_len(c: Config, model: ComposerCausalLM) -> None:
    """Refuses sequences that the model has no positions for; a Hugging Face model's limit is known once it is built."""
    for name, loader in (('train_loader', c.train_loader), ('eval_loader', c.eval_loader)):
        if loader and model.max_seq_len and loader.dataset.max_seq_len > model.max_seq_len:
            raise UserError(f'{name}.dataset.max_seq_len: {loader.dataset.max_seq_len} is above the {model.max_seq_len} '
                            'positions of the model; set a smaller max_seq_len, or more positions in model.config_overrides')


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


def cli(argv: list[str]) -> int:
    """Runs `main`; a mistake of the user ends in one message, from one rank.

    Every rank meets the same mistake, so the others wait for rank 0's message and the launcher's SIGTERM; one that
    is alone with its error speaks after that.
    """
    try:
        main(config.load(argv))
    except UserError as e:
        rank = dist.get_global_rank()
        if rank:
            time.sleep(10)
        print(f'error: {e}' if rank == 0 else f'error on rank {rank}: {e}', file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == '__main__':
    warnings.filterwarnings('ignore', category=UserWarning, module='(composer|torchmetrics)')
    code = cli(sys.argv[1:])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(code)

"""YAML in, trained model out.

    composer main.py yamls/quickstart.yaml [key=value ...]

`main` reads as the list of what a run consists of; each part is built in `src/`.
"""

import pickle
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import wandb.errors
from botocore.exceptions import BotoCoreError
from composer import Trainer
from composer.core import DataSpec, Evaluator
from composer.utils import dist, get_device, reproducibility
from omegaconf import DictConfig

from src import builders, config
from src.batch_size import device_batch_size, microbatch_size
from src.callbacks import StepCounters
from src.checks import check_checkpoints, check_seq_len
from src.data_c4 import build_c4_dataloader, get_num_tokens_in_batch
from src.errors import UserError, first_line
from src.model_registry import COMPOSER_MODEL_REGISTRY
from src.report import log, log_to_stderr, plan, summary
from src.schema import Config
from src.tokenizer import TOKENIZER_REGISTRY, check_vocab


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
    check_seq_len(c, model.max_seq_len)
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
    with explained(c):
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

    if trainer.state.max_duration is not None and trainer.state.timestamp >= trainer.state.max_duration:
        log.info('nothing to do: the checkpoint has already reached max_duration %s; set a longer one to go on', c.max_duration)
        return trainer
    if c.eval_first and c.eval_loader:
        trainer.eval()
    started = time.monotonic()
    try:
        trainer.fit()
    except FileExistsError as e:  # Composer would overwrite nothing
        raise UserError(f'save_folder: {first_line(e)}') from e
    log.info('%s', summary(trainer, c, time.monotonic() - started))
    return trainer


@contextmanager
def explained(c: Config) -> Iterator[None]:
    """What Composer and W&B raise about a checkpoint, a log or a login, in the words of the settings."""
    try:
        yield
    except UserError:
        raise
    except wandb.errors.Error as e:
        raise UserError(f'loggers.wandb: {first_line(e)}; set WANDB_API_KEY, or WANDB_MODE=offline') from e
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, BotoCoreError) as e:
        if not (c.load_path or c.autoresume):
            raise
        what = f'load_path: {c.load_path}' if c.load_path else f'autoresume: the checkpoint in {c.save_folder}'
        raise UserError(f'{what} cannot be loaded into this model and optimizer: {type(e).__name__}: {first_line(e)}') from e


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

"""YAML in, trained model out.

    composer main.py yamls/quickstart.yaml [key=value ...] [--dry_run]

`main` reads as the list of what a run consists of; each part is built in `src/`.
"""
# ruff: noqa: E402

from src import nodes, processes  # first: Composer reads what `nodes` sets, and importing it takes seconds

if __name__ == '__main__':
    processes.die_with_launcher()

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Optional

import torch
from composer import Trainer, algorithms
from composer.core import Callback, DataSpec, Evaluator
from composer.utils import dist, reproducibility
from omegaconf import DictConfig
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

from src import builders, config, rendezvous, sharding
from src.batch_size import device_batch_size, microbatch_size
from src.callbacks import GracefulStop, NonFiniteGuard, StepCounters
from src.causal_lm import ComposerCausalLM
from src.checkpoint_writer import CheckpointWriter
from src.checkpoints import check_loadable, find_start, finish_loading, same_weights
from src.checks import check_save_folder, check_seq_len, run_name
from src.data_c4 import build_c4_dataloader, get_num_tokens_in_batch
from src.dry_run import check_plugins, config_text, rehearsal
from src.errors import UserError, is_out_of_memory
from src.loggers import resume_wandb
from src.model_registry import COMPOSER_MODEL_REGISTRY
from src.processes import EXIT_STOPPED, FailureWatch, Stopped, StopRequest
from src.report import environment, log, log_to_stderr, out_of_memory, plan, summary
from src.resume import Changes, OptimizerSettings, changes, run_settings
from src.safe_reading import loading
from src.schema import Config
from src.tokenizer import TOKENIZER_REGISTRY, check_vocab


def main(cfg: DictConfig, watch: Optional[FailureWatch] = None, callbacks: Iterable[Callback] = (),
         dry_run: bool = False) -> Trainer:
    """Trains one model.

    Args:
        cfg: A config as in `yamls/`, interpolations allowed.
        watch: Ends this process when another rank fails; begins with the process group.
        callbacks: In addition to the config's.
        dry_run: Build everything, say what it is, and train, save and log nothing.

    Returns:
        The Trainer, after `fit`.

    Raises:
        UserError: Everything in the config or the data that the user can mend.
        Stopped: SIGTERM or SIGINT came; the batch at hand is finished and saved.
    """
    nodes.check_environment(os.environ)
    has_gpu, world_size = torch.cuda.is_available(), dist.get_world_size()
    c = config.check(cfg, builders.REGISTRIES, world_size, has_gpu, world_size // dist.get_local_world_size())
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
    check_save_folder(c)

    # Processes and seeds
    rendezvous.initialize(c.dist_timeout)
    stop = watch.stop if watch else StopRequest()
    if watch:
        watch.start()
    nodes.agree('config', config.flat(c))
    log.info('%s', nodes.preflight())
    reproducibility.seed_all(c.seed)

    # Where the run starts. One that is over is built without what would write.
    start = find_start(c.save_folder, run_name(c), c.autoresume, c.load_path, c.load_weights_only)
    check_loadable(start, sharding.is_sharded(c.fsdp_config, has_gpu), c.trust_checkpoint)
    over = start.kind == 'resume' and start.manifest is not None and start.manifest.reaches(c.max_duration)
    asked = c
    if dry_run:
        log.info('%s', config_text(c))
    if over or dry_run:
        c = c.model_copy(update={'loggers': {}, 'callbacks': {}, 'save_folder': None, 'log_to_console': False})

    # Model
    tokenizer = TOKENIZER_REGISTRY[c.tokenizer.name](c.tokenizer.tokenizer_name, c.tokenizer.max_seq_len)
    if dry_run:
        check_plugins(asked, tokenizer.tokenizer)
    model, parallelism = build_model(c, tokenizer, has_gpu)
    compile_config = c.compile_config.model_dump(exclude={'scope'}) if c.compile_config else None
    if c.compile_config and c.compile_config.scope == 'block':
        sharding.compile_blocks(model.model, compile_config)
        compile_config = None

    # Data
    count: Any = get_num_tokens_in_batch  # Composer's type says int, its code takes any number
    train_loader = build_c4_dataloader(c.train_loader, device_batch)
    datasets: dict[str, Any] = {'train_loader': train_loader.dataset}
    evaluators = []
    if c.eval_loader:
        eval_loader = build_c4_dataloader(c.eval_loader, c.device_eval_batch_size, evaluate=True)
        datasets['eval_loader'] = eval_loader.dataset.dataset  # pyright: ignore[reportAttributeAccessIssue]
        evaluators.append(Evaluator(label='eval', eval_interval=c.eval_interval,
                                    dataloader=DataSpec(eval_loader, get_num_tokens_in_batch=count)))
    fingerprints = {f'{name}.dataset': dataset.fingerprint for name, dataset in datasets.items()}
    nodes.agree('data', fingerprints)
    settings = run_settings(asked, fingerprints)
    changed = Changes([], False) if over else changes(start, settings, hasattr(train_loader.dataset, 'load_state_dict'))

    # Everything else
    writer = None
    if c.save_folder:
        writer = CheckpointWriter(c.save_folder, c.save_interval, c.save_num_checkpoints_to_keep, start,
                                  model.described_by or c.model.model_dump(), c.tokenizer.tokenizer_name, settings)
    if c.autoresume and c.save_folder and (name := run_name(c)):
        c = c.model_copy(update={'loggers': resume_wandb(c.loggers, name, c.save_folder)})
    chosen, profiler = builders.build_callbacks(c, tokenizer.tokenizer)
    with loading(start.setting, str(start.path), c.trust_checkpoint), explained(c):
        trainer = Trainer(
            model=model,
            train_dataloader=DataSpec(train_loader, get_num_tokens_in_batch=count),
            eval_dataloader=evaluators,
            optimizers=builders.build_optimizer(c.optimizer, model.parameters()),
            schedulers=builders.build_scheduler(c.scheduler),
            algorithms=[*builders.build_all('algorithms', c.algorithms), NonFiniteGuard(c.max_nonfinite_in_a_row)],
            callbacks=[StepCounters(), OptimizerSettings(changed.schedule), *sharding.build_callbacks(c.fsdp_config),
                       *chosen, *callbacks, *filter(None, [writer]),
                       GracefulStop(stop, writer.save_and_wait if writer else None)],
            loggers=builders.build_all('loggers', c.loggers),
            max_duration=c.max_duration,
            device_train_microbatch_size=microbatch,
            accumulate_train_batch_on_tokens=True,
            precision=precision,
            parallelism_config=parallelism,
            compile_config=compile_config,
            dist_timeout=c.dist_timeout,
            seed=c.seed,
            run_name=c.run_name,
            progress_bar=c.progress_bar and dist.get_global_rank() == 0,
            log_to_console=c.log_to_console and dist.get_global_rank() == 0,
            console_log_interval=c.console_log_interval,
            log_traces=c.log_traces,
            profiler=profiler,
            load_path=None if start.weights_of_a_file else start.path,
            load_weights_only=start.kind == 'weights',
            load_ignore_keys=same_weights(start, model.state_dict()),
            load_exclude_algorithms=dir(algorithms),  # Composer would `eval` what a checkpoint says of them
        )
    sharding.average_gradients(trainer.state.model)
    finish_loading(start, trainer)
    trainer.logger.log_hyperparameters({**config.masked(config.plain(c)), 'environment': environment(c, model)})
    log.info('%s', plan(c, model, start, device_batch, microbatch, str(precision.value), changed.lines))

    if dry_run:
        log.info('%s', rehearsal(asked, train_loader, tokenizer.tokenizer))
        return trainer
    if trainer.state.max_duration is not None and trainer.state.timestamp >= trainer.state.max_duration:
        log.info('nothing to do: the checkpoint has already reached max_duration %s; set a longer one to go on', c.max_duration)
        return trainer
    started = time.monotonic()
    with stop, explained(c, writer):
        try:
            if writer:
                writer.check(trainer.state)
            if c.eval_first and c.eval_loader and start.kind != 'resume':
                trainer.eval()
            trainer.fit()
        except Stopped:
            trainer.engine.close()  # which ends every log
            raise
    log.info('%s', summary(trainer, c, writer.newest if writer else None, time.monotonic() - started))
    return trainer


def build_model(c: Config, tokenizer: Any, has_gpu: bool) -> tuple[ComposerCausalLM, Optional[dict[str, Any]]]:
    """The model, on meta until it is sharded, and what the Trainer is to know of the sharding.

    Raises:
        UserError: It cannot be built, or does not go with the tokenizer or the length of the samples.
    """
    with explained(c):
        model = COMPOSER_MODEL_REGISTRY[c.model.name](c.model)
    check_vocab(tokenizer, model.vocab_size)
    check_seq_len(c, model.max_seq_len)
    parallelism = sharding.build_parallelism(c.fsdp_config, has_gpu)
    if any(p.is_meta for p in model.parameters()) and not (parallelism and has_gpu):
        model.model.materialize('cpu')  # Composer's FSDP would give it GPU memory
    return model, parallelism


@contextmanager
def explained(c: Config, writer: Optional[CheckpointWriter] = None) -> Iterator[None]:
    """Says which settings save memory where it runs out, and names the last whole checkpoint after a mistake."""
    try:
        yield
    except UserError as e:
        if writer and writer.newest:
            raise UserError(f'{e}\nThe last whole checkpoint is {writer.newest}') from e
        raise
    except (RuntimeError, MemoryError) as e:
        if is_out_of_memory(e):
            raise out_of_memory(c, e) from e
        raise


def guarded(work: Callable[[FailureWatch], Any]) -> int:
    """Does the work of a program, on each of its ranks; returns the exit code. A mistake of the user ends in one message."""
    warnings.filterwarnings('ignore', category=UserWarning, module='(composer|torchmetrics)')
    with FailureWatch(StopRequest()) as watch:
        try:
            work(watch)
        except Stopped as e:
            log.info('%s', e)
            watch.ignore_signals()
            return EXIT_STOPPED
        except KeyboardInterrupt:
            return 128 + 2
        except (Exception, CheckpointException) as e:
            watch.report_crash(e)
            return 1
    return 0


def cli(argv: list[str]) -> int:
    """Runs `main` with a command line."""
    settings = [arg for arg in argv if arg != '--dry_run']
    return guarded(lambda watch: main(config.load(settings), watch, dry_run=settings != argv).engine.close())


def leave(code: int) -> NoReturn:
    """Ends this process."""
    if code in (0, EXIT_STOPPED):  # after a failure it could wait for ranks that are gone
        rendezvous.leave()
    sys.exit(code)


if __name__ == '__main__':
    leave(cli(sys.argv[1:]))

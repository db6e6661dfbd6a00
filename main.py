"""YAML in, trained model out.

    composer main.py yamls/quickstart.yaml [key=value ...] [--dry_run]

`main` reads as the list of what a run consists of; each part is built in `src/`.
"""
# ruff: noqa: E402

import sys
from pathlib import Path

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # no other package is `src`

from src.common import machine, workers
from src.ranks.environment import agree, check_environment, preflight

if __name__ == '__main__':
    workers.die_with_launcher()
    machine.set_up_output()

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Optional

import torch
from composer import Trainer, algorithms
from composer.core import Callback, Evaluator
from composer.utils import dist, reproducibility
from omegaconf import DictConfig
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

from src import data_c4
from src.callbacks.graceful_stop import GracefulStop
from src.callbacks.guard import NonFiniteGuard
from src.callbacks.loggers import resume_wandb
from src.callbacks.metrics import StepCounters
from src.causal_lm import ComposerCausalLM
from src.checkpoints.loading import check_loadable, check_model, check_place, finish_loading, same_weights
from src.checkpoints.resume import Changes, OptimizerSettings, changes, run_settings
from src.checkpoints.safe_reading import loading
from src.checkpoints.start import Start, find_start
from src.checkpoints.writer import CheckpointWriter
from src.common.errors import UserError, is_out_of_memory
from src.config import load as config
from src.config.checks import check_early_stopper, check_save_folder, check_seq_len, check_warmup, in_units_of_the_run, run_name
from src.config.derived import device_batch_size, microbatch_size
from src.config.schema import Config
from src.data_c4 import build_c4_dataloader
from src.initialisation import weights_come_later
from src.model_registry import COMPOSER_MODEL_REGISTRY
from src.ranks import rendezvous
from src.ranks.failure_watch import FailureWatch
from src.ranks.stop import EXIT_STOPPED, Stopped, StopRequest
from src.tokenizer import HFTokenizer, check_vocab, load_tokenizer
from src.training import optimizers, plugins, sharding
from src.training.data import build_data_spec, check_first_batch, check_train_loader, counts_samples, epoch_length, fingerprints
from src.training.dry_run import check_plugins, config_text, rehearsal
from src.training.report import environment, log, log_to_stderr, out_of_memory, plan, summary


@plugins.outside_failures_explained()
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
    check_environment(os.environ)
    machine.shorten_socket_paths()
    has_gpu, world_size = torch.cuda.is_available(), dist.get_world_size()
    c = config.check(cfg, plugins.REGISTRIES, world_size, has_gpu, world_size // dist.get_local_world_size(),
                     has_kits_loader())
    log_to_stderr()

    # Sizes: the maths is the YAML's, the execution follows from the number of devices.
    device_batch = device_batch_size(c.global_train_batch_size, world_size)
    microbatch = c.device_train_microbatch_size
    if isinstance(microbatch, int):
        if microbatch > device_batch:
            log.warning('device_train_microbatch_size: %d is more than the %d samples that each of %d devices has; using %d',
                        microbatch, device_batch, world_size, device_batch)
        microbatch = microbatch_size(device_batch, microbatch)
    precision = plugins.resolve_precision(c.precision, has_gpu)
    check_save_folder(c)

    # Processes and seeds
    rendezvous.initialize(c.dist_timeout)
    stop = watch.stop if watch else StopRequest()
    if watch:
        watch.start()
    agree('config', config.flat(c))
    log.info('%s', preflight())
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
    tokenizer = build_tokenizer(c)
    hf_tokenizer = tokenizer and tokenizer.tokenizer
    if dry_run:
        check_plugins(asked, hf_tokenizer)
    model, parallelism = build_model(c, tokenizer, start, has_gpu)
    compile_config = c.compile_config.model_dump(exclude={'scope'}) if c.compile_config else None
    if c.compile_config and c.compile_config.scope == 'block':
        sharding.compile_blocks(model.model, compile_config)
        compile_config = None

    # Data
    train_data = build_data_spec(build_c4_dataloader(c.train_loader, device_batch), 'train_loader', model, c.seed)
    check_train_loader(c, train_data.dataloader)
    check_warmup(c, epoch_length(train_data.dataloader))
    evaluators = build_evaluators(c, model)
    metrics = {evaluator.label: model.get_metrics() for evaluator in evaluators}
    check_early_stopper(c, {'train': model.get_metrics(is_train=True), **metrics})
    if evaluators:
        check_first_batch(evaluators[0].dataloader)
    data = fingerprints(train_data, evaluators[0].dataloader if evaluators else None)
    agree('data', data)
    settings = run_settings(asked, data)
    changed = Changes([], False) if over else changes(start, settings, counts_samples(train_data.dataloader))
    if has_kits_loader() and counts_samples(train_data.dataloader) and not over:
        check_place(start, train_data.dataloader.dataset.epoch_size)  # pyright: ignore

    # Everything else
    writer = None
    if c.save_folder:
        save_interval = in_units_of_the_run(c.save_interval, c.max_duration)
        writer = CheckpointWriter(c.save_folder, save_interval, c.save_num_checkpoints_to_keep, start,
                                  model.described_by or c.model.model_dump(),
                                  tokenizer.tokenizer_name if tokenizer else '', getattr(tokenizer, 'hash', ''), settings)
    if c.autoresume and c.save_folder and (name := run_name(c)):
        c = c.model_copy(update={'loggers': resume_wandb(c.loggers, name, c.save_folder)})
    chosen, profiler = plugins.build_callbacks(c, hf_tokenizer)
    with loading(start.setting, str(start.path), c.trust_checkpoint), explained(c):
        trainer = Trainer(
            model=model,
            train_dataloader=train_data,
            eval_dataloader=evaluators,
            optimizers=optimizers.build_optimizer(c.optimizer, model.parameters()),
            schedulers=optimizers.build_scheduler(c.scheduler),
            algorithms=[*plugins.build_all('algorithms', c.algorithms), NonFiniteGuard(c.max_nonfinite_in_a_row)],
            callbacks=[StepCounters(device_batch), OptimizerSettings(changed.schedule),
                       *sharding.build_callbacks(c.fsdp_config), *chosen, *callbacks, *filter(None, [writer]),
                       GracefulStop(stop, writer.save_and_wait if writer else None)],
            loggers=plugins.build_all('loggers', c.loggers),
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
    log.info('%s', plan(c, model, start, device_batch, microbatch, str(precision.value), train_data.dataloader,
                        changed.lines))

    if dry_run:
        log.info('%s', rehearsal(asked, train_data, hf_tokenizer))
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


def has_kits_loader() -> bool:
    """Whether `build_c4_dataloader` is the kit's own: then the config's sections `dataset` say what is read."""
    return build_c4_dataloader is data_c4.build_c4_dataloader


def build_tokenizer(c: Config) -> Optional[HFTokenizer]:
    """The tokenizer; None where a loader of the user's own does without.

    Raises:
        UserError: There is none, and the kit's loader needs one; or it cannot be loaded.
    """
    if c.tokenizer:
        return load_tokenizer(c, of_loaders=has_kits_loader())
    if has_kits_loader():
        raise UserError("tokenizer: null is for a loader of your own, and build_c4_dataloader in main.py is the kit's, "
                        'which reads with a tokenizer; name one')
    return None


def build_evaluators(c: Config, model: ComposerCausalLM) -> list[Evaluator]:
    """One, labelled `eval`, of `eval_loader`; none without it."""
    if c.eval_loader is None:
        return []
    assert c.device_eval_batch_size  # the checks refuse an evaluation without it
    loader = build_c4_dataloader(c.eval_loader, c.device_eval_batch_size, evaluate=True)
    return [Evaluator(label='eval', eval_interval=in_units_of_the_run(c.eval_interval, c.max_duration),
                      device_eval_microbatch_size=c.device_eval_batch_size,
                      dataloader=build_data_spec(loader, 'eval_loader', model, c.seed))]


def build_model(c: Config, tokenizer: Any, start: Start, has_gpu: bool) -> tuple[ComposerCausalLM, Optional[dict[str, Any]]]:
    """The model, on meta until it is sharded, and what the Trainer is to know of the sharding.

    Raises:
        UserError: It cannot be built, or does not go with the tokenizer or the length of the samples.
    """
    check_model(start.manifest, c.model.model_dump(), f'{start.setting}: {start.path}')
    with explained(c), weights_come_later(start.kind != 'fresh'):
        model = COMPOSER_MODEL_REGISTRY[c.model.name](c.model)
    if not isinstance(model, ComposerCausalLM):
        raise UserError(f'model.name: {c.model.name!r} is a {type(model).__name__}; derive it from ComposerCausalLM, which has '
                        'what the run asks of a model (src/README.md, "The contract")')
    sharding.check_blocks(c.fsdp_config, model.model, has_gpu)
    if tokenizer:
        check_vocab(tokenizer, model.vocab_size)
    check_seq_len(c, model.max_seq_len)
    parallelism = sharding.build_parallelism(c.fsdp_config, has_gpu)
    if any(p.is_meta for p in model.parameters()) and not (parallelism and has_gpu):
        inner: Any = model.model
        inner.materialize('cpu')  # Composer's FSDP would give it GPU memory
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

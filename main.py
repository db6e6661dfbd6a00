"""Trains the model that a YAML describes.

    composer main.py yamls/quickstart.yaml [key=value ...] [--dry_run]

`main` is the list of the parts of a run; `src/` builds each part.
"""
# ruff: noqa: E402

import sys
from pathlib import Path

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # `src` is this folder's, no other package's
    from src.training import early

    early.set_up_rank(sys.argv[1:])  # first, because importing torch and Composer takes seconds

from collections.abc import Iterable
from typing import Optional

from composer.core import Callback
from composer.utils import dist
from omegaconf import DictConfig

from src import optimizers
from src.checkpoints import loading
from src.config.load import load
from src.ranks import program
from src.training import build, fit, plugins, sharding
from src.training.failures import explain_external_failures, explain_run_failures
from src.training.setup import prepare_run
from src.training.trainer import Trainer


@explain_external_failures()
def main(cfg: DictConfig, watch: Optional[program.FailureWatch] = None, callbacks: Iterable[Callback] = (),
         dry_run: bool = False) -> Trainer:
    """Trains one model and returns its Trainer.

    Args:
        cfg: A config as in `yamls/`; interpolations are allowed.
        watch: Ends this process when another rank fails; starts with the process group.
        callbacks: Callbacks in addition to those of the config.
        dry_run: Build and print everything, but train, save and log nothing.

    Raises:
        UserError: The config or the data has a mistake that the user can correct.
        Stopped: SIGTERM or SIGINT arrived; the current batch is finished and saved.
    """
    run = prepare_run(cfg, watch, dry_run)  # a dry run builds the same parts, except those that write
    c, start = run.c, run.start
    tokenizer = build.build_tokenizer(c)
    build.check_plugins_of_dry_run(run, tokenizer)
    model = build.build_model(c, tokenizer, start)
    train_data = build.build_train_data(c, model, run.device_batch)
    evaluators = build.build_evaluators(c, model)
    settings, changed = build.compare_with_checkpoint(run, model, train_data, evaluators)
    writer = build.build_writer(run, model, tokenizer, settings)
    all_callbacks = build.build_callbacks(run, tokenizer, changed.schedule, writer, callbacks)
    with loading.read_safely(start, c.trust_checkpoint), explain_run_failures(c):
        trainer = Trainer(
            model=model,
            train_dataloader=train_data,
            eval_dataloader=evaluators,
            optimizers=optimizers.build_optimizer(c.optimizer, model.model),
            schedulers=optimizers.build_scheduler(c.scheduler),
            algorithms=plugins.build_algorithms(c, run.stop),
            callbacks=all_callbacks,
            loggers=plugins.build_plugins('loggers', c.loggers),
            max_duration=c.max_duration,
            device_train_microbatch_size=run.microbatch,
            accumulate_train_batch_on_tokens=True,
            precision=run.precision,
            parallelism_config=sharding.build_parallelism(c.fsdp_config, run.has_gpu),
            compile_config=sharding.build_compile_config(c.compile_config),
            dist_timeout=c.dist_timeout,
            seed=c.seed,
            run_name=c.run_name,
            progress_bar=c.progress_bar and dist.get_global_rank() == 0,
            log_to_console=c.log_to_console and dist.get_global_rank() == 0,
            console_log_interval=c.console_log_interval,
            log_traces=c.log_traces,
            load_path=start.composer_load_path,
            load_weights_only=start.kind == 'weights',
            load_ignore_keys=loading.check_same_weights(start, model.state_dict()),  # a check: it ignores no key
            load_exclude_algorithms=loading.names_of_algorithms(),
        )
    loading.finish_loading(start, trainer)
    fit.log_start(run, trainer, model, train_data, changed.lines)
    fit.fit(run, trainer, train_data, writer, tokenizer)
    return trainer


def cli(argv: list[str]) -> int:
    """Runs `main` with the arguments of a command line and returns the exit code."""
    yaml_and_overrides = [arg for arg in argv if arg != '--dry_run']
    dry_run = '--dry_run' in argv
    return program.run(lambda watch: main(load(yaml_and_overrides), watch, dry_run=dry_run).engine.close())


if __name__ == '__main__':
    program.leave(cli(sys.argv[1:]))

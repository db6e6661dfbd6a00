"""Builds the parts of a run from the config: tokenizer, model, data, checkpoint writer, callbacks."""

from collections.abc import Iterable
from typing import Any, Optional

import torch
from composer.core import Callback, DataSpec, Evaluator

from src.callbacks.graceful_stop import GracefulStop
from src.callbacks.metrics import StepCounters
from src.causal_lm import ComposerCausalLM
from src.checkpoints.loading import check_model, check_sample_in_epoch
from src.checkpoints.manifest import RunInfo
from src.checkpoints.resume import SettingChanges, compare_settings, run_settings
from src.checkpoints.start import Start
from src.checkpoints.writer import CheckpointWriter
from src.common.errors import UserError
from src.config.data_checks import check_seq_len
from src.config.derived import to_batches_samples_or_tokens
from src.config.run_checks import check_early_stopper, check_warmup
from src.config.schema import Config
from src.initialisation import skip_initialisation
from src.model_registry import COMPOSER_MODEL_REGISTRY
from src.optimizers import OptimizerSettings
from src.ranks.agreement import check_ranks_agree
from src.tokenizer import HFTokenizer, check_vocab, load_tokenizer
from src.training import data, plugins, sharding
from src.training.failures import explain_run_failures
from src.training.setup import Setup


def build_tokenizer(c: Config) -> Optional[HFTokenizer]:
    """Loads the tokenizer; returns None if the config has none and the user's own loader needs none.

    Raises UserError if the kit's loader has no tokenizer, or the tokenizer cannot be loaded.
    """
    if c.tokenizer:
        return load_tokenizer(c, check_loaders=data.uses_kit_loader())
    if data.uses_kit_loader():
        raise UserError('tokenizer: null is for a loader of your own. build_c4_dataloader in src/training/data.py is '
                        "the kit's loader, which needs a tokenizer; set tokenizer.name and tokenizer_name")
    return None


def check_plugins_of_dry_run(run: Setup, tokenizer: Optional[HFTokenizer]) -> None:
    """In a dry run, which leaves callbacks and loggers out, refuses those that cannot be built."""
    if run.dry_run:
        plugins.check_plugins(run.user_config, tokenizer and tokenizer.tokenizer)


def build_model(c: Config, tokenizer: Optional[HFTokenizer], start: Start) -> ComposerCausalLM:
    """Builds the model; with `model.device: meta` and FSDP on GPUs it stays on meta until it is sharded.

    Raises UserError if the model cannot be built, or does not fit the tokenizer, the samples or the checkpoint.
    """
    has_gpu = torch.cuda.is_available()
    check_model(start.manifest, c.model.model_dump(), f'{start.setting}: {start.path}')
    with explain_run_failures(c), skip_initialisation(start.kind != 'fresh'):
        model = COMPOSER_MODEL_REGISTRY[c.model.name](c.model)
    if not isinstance(model, ComposerCausalLM):
        raise UserError(f'model.name: {c.model.name!r} is a {type(model).__name__}; derive it from ComposerCausalLM, '
                        'which has the methods that a run calls (src/README.md)')
    sharding.check_blocks(c.fsdp_config, model.model, has_gpu)
    if tokenizer:
        check_vocab(tokenizer, model.vocab_size)
    check_seq_len(c, model.max_seq_len)
    shards_on_gpu = has_gpu and sharding.build_parallelism(c.fsdp_config, has_gpu)
    if any(p.is_meta for p in model.parameters()) and not shards_on_gpu:
        inner: Any = model.model
        inner.materialize('cpu')  # Composer's FSDP would allocate GPU memory
    sharding.compile_blocks(c.compile_config, model.model)
    return model


def build_train_data(c: Config, model: ComposerCausalLM, device_batch: int) -> DataSpec:
    """Builds the loader of training. Raises UserError if that fails, or the loader lacks what a setting needs."""
    spec = data.build_data_spec(data.build_c4_dataloader(c.train_loader, device_batch), 'train_loader', model, c.seed)
    data.check_train_loader(c, spec.dataloader)
    check_warmup(c, data.count_batches(spec.dataloader))
    return spec


def build_evaluators(c: Config, model: ComposerCausalLM) -> list[Evaluator]:
    """Builds one evaluator, labelled `eval`, that reads `eval_loader`; none if `eval_loader` is null.

    Raises UserError if the loader cannot be built, or the model cannot evaluate its first batch.
    """
    if c.eval_loader is None:
        return []
    assert c.device_eval_batch_size  # the checks of the config require it
    loader = data.build_c4_dataloader(c.eval_loader, c.device_eval_batch_size, evaluate=True)
    spec = data.build_data_spec(loader, 'eval_loader', model, c.seed)
    data.check_first_batch(spec)
    return [Evaluator(label='eval', eval_interval=to_batches_samples_or_tokens(c.eval_interval, c.max_duration),
                      device_eval_microbatch_size=c.device_eval_batch_size, dataloader=spec)]


def compare_with_checkpoint(run: Setup, model: ComposerCausalLM, train: DataSpec,
                            evaluators: list[Evaluator]) -> tuple[dict[str, Any], SettingChanges]:
    """Checks that all ranks read the same data, and that a resumed run can continue with these settings and data.

    Returns the settings that this run writes into its manifests, and the changes since the checkpoint. Raises UserError
    where ranks read different data, or where the early stopper or the checkpoint does not fit the data.
    """
    check_early_stopper(run.c, {'train': model.get_metrics(is_train=True),
                                  **{evaluator.label: model.get_metrics() for evaluator in evaluators}})
    fingerprints = data.fingerprints(train, evaluators[0].dataloader if evaluators else None)
    check_ranks_agree('data', fingerprints)
    settings = run_settings(run.user_config, fingerprints)
    if run.is_finished:
        return settings, SettingChanges([], False)
    changed = compare_settings(run.start, settings, data.resumes_by_samples(train.dataloader))
    if data.uses_kit_loader() and data.resumes_by_samples(train.dataloader):
        check_sample_in_epoch(run.start, train.dataloader.dataset.epoch_size)  # pyright: ignore
    return settings, changed


def build_writer(run: Setup, model: ComposerCausalLM, tokenizer: Optional[HFTokenizer],
                 settings: dict[str, Any]) -> Optional[CheckpointWriter]:
    """Builds the callback that saves checkpoints; None without `save_folder`."""
    c = run.c
    if not c.save_folder:
        return None
    interval = to_batches_samples_or_tokens(c.save_interval, c.max_duration)
    info = RunInfo(model.manifest_config or c.model.model_dump(), tokenizer.tokenizer_name if tokenizer else '',
                   getattr(tokenizer, 'hash', ''), settings)
    return CheckpointWriter(c.save_folder, interval, c.save_num_checkpoints_to_keep, run.start, info)


def build_callbacks(run: Setup, tokenizer: Optional[HFTokenizer], new_schedule: bool,
                    writer: Optional[CheckpointWriter], extra: Iterable[Callback]) -> list[Callback]:
    """Builds all callbacks, in the order in which Composer calls them.

    `tokenizer` is for callbacks that write text. `new_schedule` is true if the learning-rate schedule of the config
    differs from the checkpoint's. `writer` saves checkpoints, if there is one. `extra` callbacks are not in the config.
    """
    fsdp = run.c.fsdp_config
    return [
        StepCounters(run.device_batch),
        OptimizerSettings(new_schedule),
        *([sharding.ReduceOncePerStep()] if fsdp and not fsdp.reduce_every_microbatch else []),
        *plugins.build_callbacks(run.c, tokenizer and tokenizer.tokenizer),
        *extra,
        *filter(None, [writer]),
        GracefulStop(run.stop, writer.save_and_wait if writer else None),
    ]

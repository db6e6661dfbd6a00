"""Prepares a run: checks the config for this machine, connects the ranks, and finds the checkpoint to start from."""

import logging
import os
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple, Optional, Union

import torch
from composer.core import Precision
from composer.utils import dist, reproducibility

from src.callbacks.loggers import resume_wandb
from src.checkpoints.loading import check_loadable
from src.checkpoints.start import Start, find_start
from src.common import machine
from src.config import load
from src.config.check import check
from src.config.derived import device_batch_size, resolve_precision, run_name
from src.config.run_checks import check_save_folder
from src.config.schema import Config
from src.ranks import rendezvous
from src.ranks.agreement import check_ranks_agree
from src.ranks.environment import check_environment
from src.ranks.failure_watch import FailureWatch
from src.ranks.preflight import preflight
from src.ranks.program import log_to_stderr
from src.ranks.stop import StopRequest
from src.training import sharding
from src.training.data import uses_kit_loader
from src.training.plugins import REGISTRIES

log = logging.getLogger('src')


class Setup(NamedTuple):
    """The inputs from which the parts of a run are built."""

    user_config: Config  # as the user wrote it
    c: Config  # for building: without the parts that write, in a dry run or after the end of the run
    start: Start
    is_finished: bool  # the checkpoint has already reached `max_duration`
    device_batch: int  # samples per optimizer step on one device
    microbatch: Union[int, str]  # samples per forward pass on one device, or `auto`
    precision: Precision
    has_gpu: bool
    dry_run: bool
    stop: StopRequest


def check_config(cfg: Any, nodes: int) -> Config:
    """Checks a config (from `load`, or any mapping) against the schema and this machine, for a run on `nodes`.

    Raises UserError, which lists every mistake.
    """
    return check(cfg, REGISTRIES, dist.get_world_size(), torch.cuda.is_available(), nodes, uses_kit_loader())


def join_ranks(c: Config, watch: Optional[FailureWatch]) -> None:
    """Connects all ranks, compares their configs, tests their network, and sets the random seeds.

    Raises UserError if a rank is missing, configs differ, or ranks cannot reach each other.
    """
    rendezvous.initialize(c.dist_timeout)
    if watch:
        watch.start()
    check_ranks_agree('config', load.flatten_masked(c))
    log.info('%s', preflight())
    reproducibility.seed_all(c.seed)


def prepare_run(cfg: Any, watch: Optional[FailureWatch], dry_run: bool) -> Setup:
    """Checks the config, connects the ranks, and finds the checkpoint to start from. Raises UserError."""
    check_environment(os.environ)
    machine.shorten_socket_paths()
    c, has_gpu = check_config(cfg, dist.get_world_size() // dist.get_local_world_size()), torch.cuda.is_available()
    log_to_stderr()
    sharding.check_microbatch_search(c, has_gpu)
    device_batch = device_batch_size(c.global_train_batch_size, dist.get_world_size())
    microbatch = resolve_microbatch(c, device_batch)
    check_save_folder(c)
    join_ranks(c, watch)
    start = find_start(c.save_folder, run_name(c), c.autoresume, c.load_path, c.load_weights_only)
    check_loadable(start, sharding.is_sharded(c.fsdp_config, has_gpu), c.trust_checkpoint)
    if dry_run:
        log.info('dry run: nothing is trained, saved or logged\nconfig:\n%s',
                 textwrap.indent(load.to_masked_yaml(c), '  ').rstrip())
    is_finished = start.kind == 'resume' and start.manifest is not None and start.manifest.reaches(c.max_duration)
    adjusted = c.model_copy(update=_adjustments(c, writes_nothing=is_finished or dry_run))
    return Setup(c, adjusted, start, is_finished, device_batch, microbatch,
                 Precision(resolve_precision(c.precision, has_gpu)), has_gpu, dry_run,
                 watch.stop if watch else StopRequest())


def resolve_microbatch(c: Config, device_batch: int) -> Union[int, str]:
    """The microbatch size of the config (or `auto`), reduced to the samples of a device if it is larger."""
    microbatch = c.device_train_microbatch_size
    if isinstance(microbatch, str):
        return microbatch
    if microbatch > device_batch:
        log.warning('device_train_microbatch_size: %d is more than the %d samples that each of %d devices has; using '
                    '%d', microbatch, device_batch, dist.get_world_size(), device_batch)
    return min(device_batch, microbatch)


def _adjustments(c: Config, writes_nothing: bool) -> Mapping[str, Any]:
    """The settings that differ between the config for building the run and the user's config."""
    if writes_nothing:
        return {'loggers': {}, 'callbacks': {}, 'save_folder': None, 'log_to_console': False}
    name = run_name(c)
    return {'loggers': resume_wandb(c.loggers, name, c.save_folder)} if c.autoresume and c.save_folder and name else {}

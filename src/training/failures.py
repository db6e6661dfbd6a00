"""Explains failures of a run: out of memory, a logger's service, a lost worker; names the last whole checkpoint."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Optional

import torch
from composer.utils import dist

from src.checkpoints.writer import CheckpointWriter
from src.common.errors import UserError, first_line, is_out_of_memory
from src.common.machine import explain_lost_worker
from src.config.plugin_entries import find_class
from src.config.schema import Config
from src.sizing.remedies import remedies
from src.training.plugins import LOGGERS, PACKAGES


@contextmanager
def explain_run_failures(c: Config, writer: Optional[CheckpointWriter] = None) -> Iterator[None]:
    """Adds the last whole checkpoint to a UserError, and turns an out-of-memory error into a list of what to change."""
    try:
        yield
    except UserError as e:
        if writer and writer.newest:
            raise UserError(f'{e}\nThe last whole checkpoint is {writer.newest}') from e
        raise
    except (RuntimeError, MemoryError) as e:
        if is_out_of_memory(e):
            raise out_of_memory_error(c, e) from e
        raise


def out_of_memory_error(c: Config, e: BaseException) -> UserError:
    """Builds the error that lists the settings to change, cheapest first."""
    steps, micro, gpus = [], c.device_train_microbatch_size, torch.cuda.device_count()
    if gpus > dist.get_local_world_size():
        steps.append(f'start with `composer main.py ...`, which uses all {gpus} GPUs of this machine; this run uses '
                     f'{dist.get_local_world_size()}')
    if micro != 1:
        smaller = micro // 2 if isinstance(micro, int) else 1
        steps.append(f'device_train_microbatch_size: {micro!r}; set {smaller} (the maths stays the same), and '
                     'device_eval_batch_size likewise')
    steps += [f'{remedy.key}: set {remedy.shown}{remedy.effect}' for remedy in remedies(c)]
    steps.append(f'more than {dist.get_world_size()} devices, a shorter max_seq_len, or a smaller model')
    listed = '\n'.join(f'  {i}. {step}' for i, step in enumerate(steps, 1))
    return UserError(f'out of memory: {first_line(e)}\nChange, in this order:\n{listed}')


@contextmanager
def explain_external_failures(loader: str = 'train_loader') -> Iterator[None]:
    """Explains failures of a logger's folder or service, and of a loader worker that the system has killed.

    `loader` is the config section that the worker probably belongs to: torch reports a lost worker at any moment, so
    the traceback does not show it. Raises UserError in both cases; other errors pass.
    """
    try:
        yield
    except Exception as e:  # each logging service has its own error classes; unknown errors are raised again
        if (name := _find_failed_logger(e)) is not None:
            raise UserError(f'loggers.{name}: {type(e).__name__}: {first_line(e)}. Change the keys of loggers.{name} '
                            f'or the environment variables of its service, or set loggers.{name}=false') from e
        if 'DataLoader worker' in str(e) and (why := explain_lost_worker(e, loader)):
            raise UserError(why) from e
        raise


def _find_failed_logger(e: BaseException) -> Optional[str]:
    """The name of the kit's logger in whose methods the error was raised; None if it looks like a bug."""
    is_local = type(e).__module__.split('.')[0] in ('builtins', 'composer', 'torch', 'src')
    if is_local and not isinstance(e, OSError):
        return None
    callers = [frame.f_locals.get('self') for frame, _ in traceback.walk_tb(e.__traceback__)]
    known = (*PACKAGES, 'file')  # a user's own logger keeps its traceback: the error may be a bug
    return next((name for caller in callers for name in known if type(caller) is find_class(LOGGERS.get(name))), None)

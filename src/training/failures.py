"""What is said where a run fails: out of memory, outside of the run, and which checkpoint is left after a mistake."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Optional

import torch
from composer.utils import dist

from src.checkpoints.writer import CheckpointWriter
from src.common.errors import UserError, first_line, is_out_of_memory
from src.common.machine import explain_lost_worker
from src.config.schema import Config
from src.sizing.remedies import remedies
from src.training.plugins import LOGGERS, PACKAGES


@contextmanager
def explain_run_failures(c: Config, writer: Optional[CheckpointWriter] = None) -> Iterator[None]:
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


def out_of_memory(c: Config, e: BaseException) -> UserError:
    """The settings to change, those first that cost least."""
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
def explain_outside_failures(loader: str = 'train_loader') -> Iterator[None]:
    """Says what failed outside of the run: the store of a logger, or a loader worker that the system has ended.

    `loader` is the section of the loader that is most likely the worker's. Raises UserError where a logger's folder
    cannot be written, its server does not answer, or its service refuses; or where a worker is lost, which torch tells
    the rank at any moment.
    """
    try:
        yield
    except Exception as e:  # the service of each logger has error classes of its own; all others are raised again
        if (name := _refusing_logger(e)) is not None:
            raise UserError(f'loggers.{name}: {type(e).__name__}: {first_line(e)}. Change the keys of loggers.{name} '
                            f'or the variables that its service reads, or switch it off: loggers.{name}=false') from e
        if 'DataLoader worker' in str(e) and (why := explain_lost_worker(e, loader)):
            raise UserError(why) from e
        raise


def _refusing_logger(e: BaseException) -> Optional[str]:
    own = type(e).__module__.split('.')[0] in ('builtins', 'composer', 'torch', 'src')
    if own and not isinstance(e, OSError):
        return None
    senders = [frame.f_locals.get('self') for frame, _ in traceback.walk_tb(e.__traceback__)]
    stock = (*PACKAGES, 'file')  # an error of another logger may be a bug: it keeps its traceback
    return next((name for sender in senders for name in stock if type(sender) is LOGGERS.get(name)), None)

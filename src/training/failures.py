"""What is said where a run fails: out of memory, and which checkpoint is left after a mistake."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Optional

import torch
from composer.utils import dist

from src.checkpoints.writer import CheckpointWriter
from src.common.errors import UserError, first_line, is_out_of_memory
from src.config.schema import Config
from src.sizing.remedies import remedies


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

"""What follows from the settings: batches, the precision, the kind of sharding, the run's name.

    global_train_batch_size = device batch * world_size
    device batch            = microbatch * grad_accum   (the last microbatch may be smaller)

The global batch is the maths, the microbatch the execution. What depends on the machine is passed in.
"""

import math
import os
from fractions import Fraction
from typing import Optional

from src.common.errors import UserError
from src.config.schema import TIME, Config, FSDPConfig


def device_batch_size(global_batch_size: int, world_size: int) -> int:
    """Samples per device and optimizer step, of `global_batch_size` over all devices.

    Raises UserError where the devices do not divide the batch; the message lists the nearest batches that they do.
    """
    if global_batch_size % world_size == 0:
        return global_batch_size // world_size
    below = global_batch_size // world_size * world_size
    sizes = [str(n) for n in (below, below + world_size) if n > 0]
    counts = [str(n) for n in range(max(1, world_size // 2), 2 * world_size) if global_batch_size % n == 0]
    raise UserError(f'global_train_batch_size: {global_batch_size} does not divide by {world_size} devices; nearest '
                    f'that do: {", ".join(sizes)}' + (f' (or run on {", ".join(counts)} devices)' if counts else ''))


def grad_accum(device_batch: int, microbatch: int) -> int:
    """Forward and backward passes per optimizer step; the last may be smaller."""
    return -(-device_batch // microbatch)


def resolve_precision(name: str, has_gpu: bool) -> str:
    """Composer's name of the precision: `auto` is amp_bf16 on a GPU and fp32 on a CPU."""
    return ('amp_bf16' if has_gpu else 'fp32') if name == 'auto' else name


def fsdp_version(cfg: Optional[FSDPConfig], has_gpu: bool) -> int:
    """1 or 2: of FSDP; 0: DDP. FSDP1 needs GPUs, so CPUs shard by version 2."""
    if cfg is None:
        return 0
    version = cfg.version or (1 if has_gpu else 2)
    return 0 if version == 2 and cfg.sharding_strategy == 'NO_SHARD' else version


def run_name(c: Config) -> Optional[str]:
    """The run's name as Composer will find it; None: it makes one up."""
    return c.run_name or os.environ.get('COMPOSER_RUN_NAME') or os.environ.get('RUN_NAME')


def to_batches_samples_or_tokens(interval: str, max_duration: str) -> str:
    """A fraction of the run as a number of batches, samples or tokens; any other interval as it is.

    Composer cannot divide a run whose loader has no length, as where text is packed on the fly.
    """
    fraction, run = TIME.fullmatch(interval), TIME.fullmatch(max_duration)
    if not fraction or not run or fraction[2] != 'dur' or run[2] == 'ep':
        return interval
    return f'{math.ceil(Fraction(fraction[1]) * int(run[1]))}{run[2]}'

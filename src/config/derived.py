"""Values that follow from the settings: batch sizes, precision, version of FSDP, the name of the run.

    global_train_batch_size = device batch * world_size
    device batch            = microbatch * grad_accum   (the last microbatch may be smaller)

The global batch changes the training, the microbatch only its memory and speed. Functions get facts about the machine
as arguments.
"""

import math
import os
from fractions import Fraction
from typing import NamedTuple, Optional

from src.common.errors import UserError
from src.common.machine import compiler_errors
from src.config.schema import TIME, CompileConfig, Config, FSDPConfig, ModernGPTConfig


def device_batch_size(global_batch_size: int, world_size: int) -> int:
    """Samples per device and optimizer step: the global batch divided by the number of devices.

    Raises UserError if the division leaves a rest; the message lists the nearest batch sizes that are possible.
    """
    if global_batch_size % world_size == 0:
        return global_batch_size // world_size
    below = global_batch_size // world_size * world_size
    sizes = [str(n) for n in (below, below + world_size) if n > 0]
    counts = [str(n) for n in range(max(1, world_size // 2), 2 * world_size) if global_batch_size % n == 0]
    raise UserError(f'global_train_batch_size: {global_batch_size} does not divide by {world_size} devices; set '
                    f'{" or ".join(sizes)}' + (f', or run on {" or ".join(counts)} devices' if counts else ''))


def grad_accum(device_batch: int, microbatch: int) -> int:
    """Microbatches per optimizer step; the last one may be smaller."""
    return -(-device_batch // microbatch)


class ModernShape(NamedTuple):
    """Sizes of a `modern_gpt` that the config may leave out."""

    head_dim: int
    n_kv_heads: int
    d_hidden: int


def modern_shape(cfg: ModernGPTConfig) -> ModernShape:
    """SwiGLU has three matrices where an MLP with GELU has two, so 8/3 d_model costs as much as 4 d_model there."""
    return ModernShape(cfg.head_dim or cfg.d_model // cfg.n_heads, cfg.n_kv_heads or cfg.n_heads,
                       cfg.d_hidden or -(-8 * cfg.d_model // (3 * 128)) * 128)


def resolve_precision(name: str, has_gpu: bool) -> str:
    """Composer's name of the precision: `auto` is amp_bf16 on a GPU and fp32 on a CPU."""
    return ('amp_bf16' if has_gpu else 'fp32') if name == 'auto' else name


def compile_scope(cfg: Optional[CompileConfig], has_gpu: bool) -> Optional[str]:
    """What torch.compile compiles: block, model or None. `auto` is `block` on a GPU with a C compiler, else None."""
    if cfg is None or cfg.scope != 'auto':
        return cfg and cfg.scope
    return 'block' if has_gpu and not compiler_errors(has_gpu) else None


def fsdp_version(cfg: Optional[FSDPConfig], has_gpu: bool) -> int:
    """The version of FSDP, 1 or 2; 0 for DDP. FSDP1 needs GPUs, so CPUs use version 2."""
    if cfg is None:
        return 0
    version = cfg.version or (1 if has_gpu else 2)
    return 0 if version == 2 and cfg.sharding_strategy == 'NO_SHARD' else version


def run_name(c: Config) -> Optional[str]:
    """The name of the run as Composer will find it; None where Composer makes up a random one."""
    return c.run_name or os.environ.get('COMPOSER_RUN_NAME') or os.environ.get('RUN_NAME')


def to_batches_samples_or_tokens(interval: str, max_duration: str) -> str:
    """Turns a fraction of the run into a number of batches, samples or tokens; returns other intervals unchanged.

    Composer cannot do this where the loader has no length, as with text that is packed on the fly.
    """
    fraction, run = TIME.fullmatch(interval), TIME.fullmatch(max_duration)
    if not fraction or not run or fraction[2] != 'dur' or run[2] == 'ep':
        return interval
    return f'{math.ceil(Fraction(fraction[1]) * int(run[1]))}{run[2]}'

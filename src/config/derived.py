"""The arithmetic between the global batch (the maths) and the microbatch (the execution).

    global_train_batch_size = device batch * world_size
    device batch            = microbatch * grad_accum   (the last microbatch may be smaller)

Everything here is pure: the world size is passed in.
"""

from src.common.errors import UserError


def device_batch_size(global_batch_size: int, world_size: int) -> int:
    """Samples per device and optimizer step.

    Args:
        global_batch_size: Samples per optimizer step over all devices.
        world_size: Number of devices.

    Raises:
        UserError: The devices do not divide the batch; the message lists the nearest batches that they do.
    """
    if global_batch_size % world_size == 0:
        return global_batch_size // world_size
    below = global_batch_size // world_size * world_size
    sizes = [str(n) for n in (below, below + world_size) if n > 0]
    counts = [str(n) for n in range(max(1, world_size // 2), 2 * world_size) if global_batch_size % n == 0]
    raise UserError(f'global_train_batch_size: {global_batch_size} does not divide by {world_size} devices; nearest that do: '
                    f'{", ".join(sizes)}' + (f' (or run on {", ".join(counts)} devices)' if counts else ''))


def microbatch_size(device_batch: int, requested: int) -> int:
    """Samples per forward pass: what was asked for, but never more than the device has."""
    return min(device_batch, requested)


def grad_accum(device_batch: int, microbatch: int) -> int:
    """Forward and backward passes per optimizer step; the last may be smaller."""
    return -(-device_batch // microbatch)


def resolve_precision(name: str, has_gpu: bool) -> str:
    """Composer's name of the precision: `auto` is amp_bf16 on a GPU and fp32 on a CPU."""
    return ('amp_bf16' if has_gpu else 'fp32') if name == 'auto' else name

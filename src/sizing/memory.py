"""Peak memory of a training step on one device, for the model that the config builds and any number of devices."""

from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from src import optimizers
from src.common.errors import UserError
from src.config.derived import device_batch_size, fsdp_version, grad_accum, resolve_precision
from src.config.schema import Config, OptimizerConfig
from src.sizing.step_trace import (
    BACKWARD,
    EMBEDDINGS,
    END,
    FORWARD,
    LOSS,
    START,
    UNIT_END,
    Phase,
    Settings,
    Trace,
    trace,
)

# An estimate, not measured: CUDA context, cuBLAS and NCCL buffers, what the caching allocator cannot hand out again.
GPU_WORKSPACE = 3 * 2**29


class Memory(NamedTuple):
    """Bytes on one device at one moment of a training step. `predict` returns the moment that needs the most.

    N are all parameters, and n the devices that share one copy of the weights. An FSDP unit is usually a block. The
    root are the parameters outside of the units, such as embeddings.

    Attributes:
        moment: Which moment it is, in words.
        weights: Master weights in fp32, 4 N / n. FSDP adds the weights that it gathers, in the precision of
            `mixed_precision`: the root, and the unit at work with the one that is fetched ahead, or all units with
            SHARD_GRAD_OP. Without FSDP, autocast adds copies in low precision.
        gradients: In fp32, 4 N / n. DDP adds its buckets, 4 N. FSDP adds the gradients of a unit in reduction.
        optimizer: What the optimizer keeps, from the second step on: 8 N / n for Adam.
        activations: What autograd keeps of the forward pass, and what passes through the backward pass.
        logits: What the loss makes: logits, and the gradients of its input and of the head.
        workspace: A constant: `GPU_WORKSPACE`, an estimate; 0 on a CPU.
    """

    moment: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int

    @property
    def total(self) -> int:
        return sum(self[1:])


class Sharding(NamedTuple):
    """How devices share the weights; the last four are 0 where blocks compute with the master weights themselves."""

    shards: int  # devices that together hold one copy
    buckets: bool  # DDP's, for its gradients
    version: int  # of FSDP
    weight: int  # bytes of a gathered weight, and of its gradient
    reduce: int  # bytes of a gradient on its way between devices
    ahead: int  # units gathered at once in the backward pass


def is_accumulated(c: Config, world_size: int, microbatch: int) -> bool:
    """Whether a step has several microbatches."""
    return grad_accum(device_batch_size(c.global_train_batch_size, world_size), microbatch) > 1


def low_precision(c: Config, has_gpu: bool) -> Optional[torch.dtype]:
    """The type of autocast; None: without."""
    return {'amp_bf16': torch.bfloat16, 'amp_fp16': torch.float16}.get(resolve_precision(c.precision, has_gpu))


def sharding_of(c: Config, world_size: int, has_gpu: bool) -> Sharding:
    """How FSDP or DDP shares the weights.

    Raises:
        UserError: The copies of the model do not divide the devices.
    """
    low = 2 if low_precision(c, has_gpu) else 4
    f, version = c.fsdp_config, fsdp_version(c.fsdp_config, has_gpu)
    if f is None or version == 0:
        return Sharding(1, world_size > 1, 0, 0, 0, 0)
    replicas = f.data_parallel_replicate_degree or 1
    shards = 1 if f.sharding_strategy == 'NO_SHARD' else f.data_parallel_shard_degree
    if shards == -1 and world_size % replicas:
        raise UserError(f'fsdp_config.data_parallel_replicate_degree: {replicas} copies of the model do not divide '
                        f'{world_size} devices; set a number that does')
    shards = world_size // replicas if shards == -1 else shards
    weight = 4 if f.mixed_precision == 'FULL' else low
    if version == 1 and shards == 1 and weight == 4:
        return Sharding(1, False, 0, 0, 0, 0)
    ahead = 2 if version == 2 else 1 + f.backward_prefetch_limit * (f.backward_prefetch == 'BACKWARD_PRE')
    return Sharding(shards, False, version, weight, low if f.mixed_precision == 'PURE' else 4, ahead)


def traced(c: Config, world_size: int, has_gpu: bool, microbatch: int) -> Trace:
    """The step of one device without master weights, optimizer and FSDP; arguments and errors as of `moments`."""
    sharding, low, f = sharding_of(c, world_size, has_gpu), low_precision(c, has_gpu), c.fsdp_config
    f = f if fsdp_version(f, has_gpu) else None
    return trace(Settings(
        model=c.model, microbatch=microbatch, seq_len=c.train_loader.dataset.max_seq_len, has_gpu=has_gpu, autocast=low,
        weights=low if low and sharding.weight == 2 else torch.float32, sharded=sharding.weight > 0,
        accumulates=not sharding.weight and is_accumulated(c, world_size, microbatch),
        checkpointing=f is not None and f.activation_checkpointing,
        offload=f is not None and f.activation_cpu_offload and has_gpu))


def state_bytes(cfg: OptimizerConfig) -> float:
    """Bytes that the optimizer keeps for a parameter, by a step of it on a small matrix: 8 for Adam."""
    p = nn.Parameter(torch.zeros(64, 64))
    p.grad = torch.zeros(64, 64)
    optimizer = optimizers.build_optimizer(cfg, [p])
    optimizer.param_groups[0]['initial_lr'] = cfg.lr  # which Composer's schedulers set
    optimizer.step()
    kept = [x for x in tree_leaves(dict(optimizer.state[p])) if isinstance(x, torch.Tensor) and x.dim()]
    return sum(x.nbytes for x in kept) / p.numel()


def sharded_bytes(s: Sharding, t: Trace, phase: Phase, keeps_units: bool) -> tuple[int, int]:
    """What FSDP holds in a phase besides the shards: weights that it has gathered, gradients that it reduces."""
    name, i = phase
    root = t.model.n_params - sum(t.units)
    if name in (EMBEDDINGS, END):
        gathered: Sequence[int] = ()
    elif keeps_units:
        gathered = t.units
    elif name == FORWARD:
        gathered = t.units[max(0, i + 1 - s.version):i + 1]  # FSDP2 keeps the buffer of the unit before
    elif name == LOSS:
        gathered = t.units[-1:] if s.version == 2 else ()
    else:
        gathered = t.units[-1:] if name == START else t.units[max(0, i + 1 - s.ahead):i + 1]
    reduced = 0
    if name in (BACKWARD, EMBEDDINGS) and s.version == 2:
        reduced = s.reduce * sum(t.units[i + 1:i + 2])  # FSDP2 keeps what it reduces until the next unit's turn
    elif name == UNIT_END:
        reduced = (s.reduce if s.version == 2 else s.weight) * t.units[i] + 4 * t.units[i] // s.shards
    elif name == END:
        reduced = max(s.weight, s.reduce) * root
    return s.weight * (root + sum(gathered)), reduced


def moments(c: Config, world_size: int, has_gpu: bool, microbatch: int) -> list[Memory]:
    """The peak of each part of a step. The last one, the optimizer's step, holds what stays from step to step.

    Not counted: metrics, `algorithms` that copy the model (ema, swa), what `compile_config` and `linear_impl: fp8` save
    or add, FSDP1's `keep_low_precision_grads` and `limit_all_gathers: false`.

    Args:
        c: The config.
        world_size: Number of devices.
        has_gpu: Whether they are GPUs.
        microbatch: Samples per forward pass on one device.

    Raises:
        UserError: The model cannot run without data, or the devices do not divide the global batch.
    """
    f, t = c.fsdp_config, traced(c, world_size, has_gpu, microbatch)
    s = sharding_of(c, world_size, has_gpu)
    accumulates = is_accumulated(c, world_size, microbatch)
    workspace, n_params = GPU_WORKSPACE if has_gpu else 0, t.model.n_params
    n_trained = sum(p.numel() for p in t.model.parameters() if p.requires_grad)
    shard, optimizer = 4 * n_params // s.shards, int(state_bytes(c.optimizer) * n_trained) // s.shards
    trained = summed = 4 * n_trained // s.shards
    buckets = 4 * n_trained if s.buckets else 0
    if f and not f.reduce_every_microbatch:
        summed = (s.reduce if s.version == 2 else s.weight) * n_trained
    out = []
    for phase, held in t.peaks.items():
        weights, gradients = 0, buckets
        if s.weight:
            weights, gradients = sharded_bytes(s, t, phase, f is not None and f.sharding_strategy == 'SHARD_GRAD_OP')
            done = t.units[phase.unit + 1:] if phase.name in (BACKWARD, UNIT_END, EMBEDDINGS) else ()
            gradients += trained if phase.name == END else summed if accumulates else 4 * sum(done) // s.shards
        name = phase.name if phase.unit < 0 else f'{phase.name} of block {phase.unit + 1} of {len(t.units)}'
        out.append(Memory(name, shard + weights + held['weights'], gradients + held['gradients'], optimizer,
                          held['activations'], held['logits'], workspace))
    return [*out, Memory('optimizer step', shard, buckets + trained, optimizer, 0, 0, workspace)]


def predict(c: Config, world_size: int, has_gpu: bool, microbatch: int) -> Memory:
    """The peak: the largest of `moments`, whose arguments these are."""
    return max(moments(c, world_size, has_gpu, microbatch), key=lambda moment: moment.total)


def table(memory: Memory) -> str:
    """Lines for people, in GiB."""
    parts = memory._asdict() | {'peak': memory.total}
    lines = [f'predicted memory of a device, {parts.pop("moment")}:']
    return '\n'.join(lines + [f'  {name:12}{size / 2**30:9.2f} GiB' for name, size in parts.items()])

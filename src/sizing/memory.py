"""Peak memory of a training step on one device, for the model that the config builds and any number of devices."""

from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from src import optimizers
from src.config.derived import device_batch_size, fsdp_version, grad_accum, resolve_precision
from src.config.schema import Config, FSDPConfig, OptimizerConfig
from src.sizing.step_trace import BACKWARD, EMBEDDINGS, END, FORWARD, LOSS, START, UNIT_END, Phase, Step, Trace, trace

# An estimate, not measured: CUDA context, cuBLAS and NCCL buffers, what the caching allocator cannot hand out again.
GPU_WORKSPACE = 3 * 2**29


class Memory(NamedTuple):
    """Bytes on one device at one moment of a training step. `predict` returns the moment that needs the most.

    N are all parameters, and n the devices that share one copy of the weights. An FSDP unit is usually a block. The
    root are the parameters outside of the units, such as embeddings.
    """

    moment: str  # in words
    # Master weights in fp32, 4 N / n, and copies: what FSDP gathers in the precision of `mixed_precision` (the root,
    # and the unit at work with the one that is fetched ahead; with SHARD_GRAD_OP all), or what autocast makes
    weights: int
    gradients: int  # in fp32, 4 N / n; DDP's buckets, 4 N, or those of a unit that FSDP reduces
    optimizer: int  # what the optimizer keeps, from the second step on: 8 N / n for Adam
    activations: int  # what autograd keeps of the forward pass, and what passes through the backward pass
    logits: int  # what the loss makes: logits, and the gradients of its input and of the head
    workspace: int  # `GPU_WORKSPACE`; 0 on a CPU

    @property
    def total(self) -> int:
        return sum(self[1:])


class Sharding(NamedTuple):
    """How devices share the weights. `weight` is 0 where blocks compute with the master weights themselves."""

    shards: int = 1  # devices that together hold one copy
    version: int = 0  # of FSDP
    weight: int = 0  # bytes of a gathered weight, and of its gradient
    reduce: int = 0  # bytes of a gradient on its way between devices
    ahead: int = 0  # units gathered at once in the backward pass


def sharding_of(c: Config, world_size: int, has_gpu: bool) -> Sharding:
    """How FSDP shares the weights."""
    f, version = c.fsdp_config, fsdp_version(c.fsdp_config, has_gpu)
    if f is None or version == 0:
        return Sharding()
    shards = 1 if f.sharding_strategy == 'NO_SHARD' else f.data_parallel_shard_degree
    if shards == -1:
        shards = world_size // (f.data_parallel_replicate_degree or 1)
    low = 2 if low_precision(c, has_gpu) else 4
    weight = 4 if f.mixed_precision == 'FULL' else low
    if version == 1 and shards == 1 and weight == 4:
        return Sharding()
    ahead = 2 if version == 2 else 1 + f.backward_prefetch_limit * (f.backward_prefetch == 'BACKWARD_PRE')
    return Sharding(shards, version, weight, low if f.mixed_precision == 'PURE' else 4, ahead)


def low_precision(c: Config, has_gpu: bool) -> Optional[torch.dtype]:
    """The type of autocast; None: without."""
    return {'amp_bf16': torch.bfloat16, 'amp_fp16': torch.float16}.get(resolve_precision(c.precision, has_gpu))


def is_accumulated(c: Config, world_size: int, microbatch: int) -> bool:
    """Whether a step has several microbatches."""
    return grad_accum(device_batch_size(c.global_train_batch_size, world_size), microbatch) > 1


def traced(c: Config, world_size: int, has_gpu: bool, microbatch: int) -> Trace:
    """The step of one device without master weights, optimizer and FSDP; arguments and errors as of `moments`."""
    s, low = sharding_of(c, world_size, has_gpu), low_precision(c, has_gpu)
    f = c.fsdp_config if c.fsdp_config and fsdp_version(c.fsdp_config, has_gpu) else FSDPConfig()
    return trace(Step(
        model=c.model, microbatch=microbatch, seq_len=c.train_loader.dataset.max_seq_len, has_gpu=has_gpu, autocast=low,
        weights=low if low and s.weight == 2 else torch.float32, sharded=s.weight > 0,
        accumulates=not s.weight and is_accumulated(c, world_size, microbatch),
        checkpointing=f.activation_checkpointing, offload=f.activation_cpu_offload and has_gpu))


def state_bytes(cfg: OptimizerConfig) -> float:
    """Bytes that the optimizer keeps for a parameter, by a step of it on a small matrix: 8 for Adam."""
    p = nn.Parameter(torch.zeros(64, 64))
    p.grad = torch.zeros_like(p)
    optimizer = optimizers.build_optimizer(cfg, [p])
    optimizer.param_groups[0]['initial_lr'] = cfg.lr  # which Composer's schedulers set
    optimizer.step()
    kept = [x for x in tree_leaves(dict(optimizer.state[p])) if isinstance(x, torch.Tensor) and x.dim()]
    return sum(x.nbytes for x in kept) / p.numel()


def gathered(s: Sharding, t: Trace, phase: Phase, keeps_units: bool) -> int:
    """The weights that FSDP has gathered in a phase."""
    units: Sequence[int] = t.units
    if phase.name in (EMBEDDINGS, END):
        units = ()
    elif not keeps_units:
        end = len(units) if phase.name in (LOSS, START) else phase.unit + 1
        # FSDP2 keeps the buffer of the unit before
        n_units = {FORWARD: s.version, LOSS: s.version - 1, START: 1}.get(phase.name, s.ahead)
        units = units[max(0, end - n_units):end]
    return s.weight * (t.root + sum(units))


def reduced(s: Sharding, t: Trace, phase: Phase) -> int:
    """The gradients that FSDP reduces in a phase."""
    name, i = phase
    if name in (BACKWARD, EMBEDDINGS) and s.version == 2:
        return s.reduce * sum(t.units[i + 1:i + 2])  # FSDP2 keeps what it reduces until the next unit's turn
    if name == UNIT_END:
        return (s.reduce if s.version == 2 else s.weight) * t.units[i] + 4 * t.units[i] // s.shards
    return max(s.weight, s.reduce) * t.root if name == END else 0


def moments(c: Config, world_size: int, has_gpu: bool, microbatch: int) -> list[Memory]:
    """The peak of each part of a step. The last one, the optimizer's step, holds what stays from step to step.

    Not counted: metrics, `algorithms` that copy the model (ema, swa), what `compile_config` and `linear_impl: fp8` save
    or add, FSDP1's `keep_low_precision_grads` and `limit_all_gathers: false`. `microbatch` counts samples per forward
    pass on one device. Raises UserError where the model cannot run without data, or the devices do not divide the
    global batch.
    """
    t, s, f = traced(c, world_size, has_gpu, microbatch), sharding_of(c, world_size, has_gpu), c.fsdp_config
    n_trained = sum(p.numel() for p in t.model.parameters() if p.requires_grad)
    shard, trained = 4 * t.model.n_params // s.shards, 4 * n_trained // s.shards
    optimizer, workspace = int(state_bytes(c.optimizer) * n_trained) // s.shards, GPU_WORKSPACE if has_gpu else 0
    buckets = 4 * n_trained if world_size > 1 and not fsdp_version(f, has_gpu) else 0
    keeps_units = f is not None and f.sharding_strategy == 'SHARD_GRAD_OP'
    summed = trained if is_accumulated(c, world_size, microbatch) else 0  # gradients of earlier microbatches
    if summed and f and not f.reduce_every_microbatch:
        summed = (s.reduce if s.version == 2 else s.weight) * n_trained
    out = []
    for phase, held in t.peaks.items():
        weights, gradients = shard + held['weights'], buckets + held['gradients']
        if s.weight:
            done = t.units[phase.unit + 1:] if phase.name in (BACKWARD, UNIT_END, EMBEDDINGS) else ()
            weights += gathered(s, t, phase, keeps_units)
            gradients += reduced(s, t, phase) + (trained if phase.name == END else summed or 4 * sum(done) // s.shards)
        name = phase.name if phase.unit < 0 else f'{phase.name} of block {phase.unit + 1} of {len(t.units)}'
        out.append(Memory(name, weights, gradients, optimizer, held['activations'], held['logits'], workspace))
    return [*out, Memory('optimizer step', shard, buckets + trained, optimizer, 0, 0, workspace)]


def predict(c: Config, world_size: int, has_gpu: bool, microbatch: int) -> Memory:
    """The peak: the largest of `moments`, whose arguments these are."""
    return max(moments(c, world_size, has_gpu, microbatch), key=lambda moment: moment.total)

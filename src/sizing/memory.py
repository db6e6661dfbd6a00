"""Predicts the peak memory of a training step on one device, for the config's model and any number of devices."""

from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from src import optimizers
from src.config.derived import device_batch_size, fsdp_version, grad_accum, resolve_precision
from src.config.schema import Config, FSDPConfig, OptimizerConfig
from src.sizing.step_trace import BACKWARD, EMBEDDINGS, END, FORWARD, LOSS, START, UNIT_END, Phase, Step, Trace, trace

# Not measured: CUDA context, buffers of cuBLAS and NCCL, and fragments that the caching allocator cannot reuse.
GPU_WORKSPACE = 3 * 2**29


class Memory(NamedTuple):
    """Bytes on one device at one moment of a training step. `predict` returns the moment that needs the most.

    N is the number of parameters, and n the number of devices that share one copy of the weights. An FSDP unit is
    usually a block. The root holds the parameters outside of the units, such as embeddings.
    """

    moment: str  # a description, such as 'in the loss'
    # Master weights in fp32, 4 N / n, plus copies. FSDP gathers copies in the precision of `mixed_precision`: the root,
    # the unit at work and the unit that is fetched ahead; with SHARD_GRAD_OP all units. Without FSDP, autocast copies.
    weights: int
    gradients: int  # in fp32, 4 N / n, plus DDP's buckets, 4 N, or the gradients of a unit that FSDP reduces
    # Optimizer state, which exists from the second step on: for Adam 8 N / n, for the matrices of Muon 4 N / n
    optimizer: int
    activations: int  # tensors that autograd keeps of the forward pass, and temporary tensors of the backward pass
    logits: int  # the loss: logits, and the gradients of its input and of the head's weight
    workspace: int  # `GPU_WORKSPACE`; 0 on a CPU

    @property
    def total(self) -> int:
        return sum(self[1:])


class Sharding(NamedTuple):
    """How FSDP shares the weights. `weight_bytes` is 0 where blocks compute with the master weights directly."""

    shards: int = 1  # devices that share one copy of the weights
    version: int = 0  # of FSDP; 0: no FSDP
    weight_bytes: int = 0  # of a gathered weight, and of its gradient
    reduce_bytes: int = 0  # of a gradient while devices reduce it
    n_gathered: int = 0  # units that are gathered at the same time in the backward pass


def sharding_of(c: Config, world_size: int, has_gpu: bool) -> Sharding:
    """How FSDP shares the weights of this config among `world_size` devices."""
    f, version = c.fsdp_config, fsdp_version(c.fsdp_config, has_gpu)
    if f is None or version == 0:
        return Sharding()
    shards = 1 if f.sharding_strategy == 'NO_SHARD' else f.data_parallel_shard_degree
    if shards == -1:
        shards = world_size // (f.data_parallel_replicate_degree or 1)
    low = 2 if autocast_dtype(c, has_gpu) else 4
    weight = 4 if f.mixed_precision == 'FULL' else low
    if version == 1 and shards == 1 and weight == 4:
        return Sharding()
    ahead = 2 if version == 2 else 1 + f.backward_prefetch_limit * (f.backward_prefetch == 'BACKWARD_PRE')
    return Sharding(shards, version, weight, low if f.mixed_precision == 'PURE' else 4, ahead)


def autocast_dtype(c: Config, has_gpu: bool) -> Optional[torch.dtype]:
    """The type that autocast computes in; None: no autocast."""
    return {'amp_bf16': torch.bfloat16, 'amp_fp16': torch.float16}.get(resolve_precision(c.precision, has_gpu))


def has_several_microbatches(c: Config, world_size: int, microbatch: int) -> bool:
    """Whether a device accumulates the gradients of several microbatches in a step."""
    return grad_accum(device_batch_size(c.global_train_batch_size, world_size), microbatch) > 1


def trace_config(c: Config, world_size: int, has_gpu: bool, microbatch: int) -> Trace:
    """Traces one device's step without master weights, optimizer and FSDP. Arguments and errors: see `moments`."""
    s, low = sharding_of(c, world_size, has_gpu), autocast_dtype(c, has_gpu)
    f = c.fsdp_config if c.fsdp_config and fsdp_version(c.fsdp_config, has_gpu) else FSDPConfig()
    return trace(Step(
        model=c.model, microbatch=microbatch, seq_len=c.train_loader.dataset.max_seq_len, has_gpu=has_gpu, autocast=low,
        weights=low if low and s.weight_bytes == 2 else torch.float32, sharded=s.weight_bytes > 0,
        accumulates=not s.weight_bytes and has_several_microbatches(c, world_size, microbatch),
        checkpointing=f.activation_checkpointing, offload=f.activation_cpu_offload and has_gpu))


def optimizer_state_bytes(cfg: OptimizerConfig, model: nn.Module) -> int:
    """Bytes of optimizer state of all trained parameters, for Adam 8 times their number.

    Measured with a step, for each parameter group, on a column as high as its first parameter. The parameters of
    `model` need no data.
    """
    optimizer, total = optimizers.build_optimizer(cfg, model), 0.0
    for group in list(optimizer.param_groups):
        p = nn.Parameter(torch.zeros(group['params'][0].shape[0], 1))
        p.grad = torch.zeros_like(p)
        optimizer.param_groups = [{**group, 'params': [p], 'initial_lr': cfg.lr}]  # Composer's schedulers set this key
        optimizer.step()
        kept = [x for x in tree_leaves(dict(optimizer.state[p])) if isinstance(x, torch.Tensor) and x.dim()]
        n_trained = sum(q.numel() for q in group['params'] if q.requires_grad)
        total += sum(x.nbytes for x in kept) / p.numel() * n_trained
    return int(total)


def gathered_bytes(s: Sharding, t: Trace, phase: Phase, keeps_units: bool) -> int:
    """Bytes of the weights that FSDP has gathered in a phase. `keeps_units`: as with SHARD_GRAD_OP."""
    units: Sequence[int] = t.units
    if phase.name in (EMBEDDINGS, END):
        units = ()
    elif not keeps_units:
        end = len(units) if phase.name in (LOSS, START) else phase.unit + 1
        # FSDP2 also keeps the buffer of the previous unit
        n_units = {FORWARD: s.version, LOSS: s.version - 1, START: 1}.get(phase.name, s.n_gathered)
        units = units[max(0, end - n_units):end]
    return s.weight_bytes * (t.root + sum(units))


def reduced_bytes(s: Sharding, t: Trace, phase: Phase) -> int:
    """Bytes of the gradients that FSDP reduces in a phase."""
    name, i = phase
    if name in (BACKWARD, EMBEDDINGS) and s.version == 2:
        return s.reduce_bytes * sum(t.units[i + 1:i + 2])  # FSDP2 keeps this buffer until the next unit ends
    if name == UNIT_END:
        return (s.reduce_bytes if s.version == 2 else s.weight_bytes) * t.units[i] + 4 * t.units[i] // s.shards
    return max(s.weight_bytes, s.reduce_bytes) * t.root if name == END else 0


def moments(c: Config, world_size: int, has_gpu: bool, microbatch: int) -> list[Memory]:
    """The peak of each part of a step. The last one, the optimizer step, holds the tensors that exist between steps.

    The prediction leaves out metrics, `algorithms` that copy the model (ema, swa), the effect of `compile_config` and
    `linear_impl: fp8`, and FSDP1's `keep_low_precision_grads` and `limit_all_gathers: false`. `microbatch` counts
    samples per forward pass on one device. Raises UserError if the model cannot run without data, or the devices do
    not divide the global batch.
    """
    t, s, f = trace_config(c, world_size, has_gpu, microbatch), sharding_of(c, world_size, has_gpu), c.fsdp_config
    n_trained = sum(p.numel() for p in t.model.parameters() if p.requires_grad)
    shard, trained = 4 * t.model.n_params // s.shards, 4 * n_trained // s.shards
    optimizer = optimizer_state_bytes(c.optimizer, t.model.model) // s.shards
    workspace = GPU_WORKSPACE if has_gpu else 0
    buckets = 4 * n_trained if world_size > 1 and not fsdp_version(f, has_gpu) else 0
    keeps_units = f is not None and f.sharding_strategy == 'SHARD_GRAD_OP'
    earlier = trained if has_several_microbatches(c, world_size, microbatch) else 0  # gradients of earlier microbatches
    if earlier and f and not f.reduce_every_microbatch:
        earlier = (s.reduce_bytes if s.version == 2 else s.weight_bytes) * n_trained
    out = []
    for phase, live in t.peaks.items():
        weights, gradients = shard + live['weights'], buckets + live['gradients']
        if s.weight_bytes:
            done = t.units[phase.unit + 1:] if phase.name in (BACKWARD, UNIT_END, EMBEDDINGS) else ()
            finished = trained if phase.name == END else earlier or 4 * sum(done) // s.shards
            weights += gathered_bytes(s, t, phase, keeps_units)
            gradients += reduced_bytes(s, t, phase) + finished
        name = phase.name if phase.unit < 0 else f'{phase.name} of block {phase.unit + 1} of {len(t.units)}'
        out.append(Memory(name, weights, gradients, optimizer, live['activations'], live['logits'], workspace))
    return [*out, Memory('optimizer step', shard, buckets + trained, optimizer, 0, 0, workspace)]


def predict(c: Config, world_size: int, has_gpu: bool, microbatch: int) -> Memory:
    """The moment of a step that needs the most memory. Arguments and errors: see `moments`."""
    return max(moments(c, world_size, has_gpu, microbatch), key=lambda moment: moment.total)

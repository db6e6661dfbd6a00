"""Settings of the model, its sharding and its compilation that are valid one by one and impossible together."""

from collections.abc import Iterator
from typing import Optional

from src.common.machine import compiler_errors
from src.config.data_checks import loaders
from src.config.derived import fsdp_version
from src.config.schema import CompileConfig, Config, FSDPConfig, HFCausalLMConfig, MosaicGPTConfig

HF_SIZES = ('n_embd', 'n_layer', 'n_head', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'vocab_size')
FLASH_NEEDS_GPU = "model.attn_impl: 'flash' needs a GPU; set model.attn_impl=auto (or sdpa)"


def heads_error(model: MosaicGPTConfig) -> Optional[str]:
    """What to say where the heads do not divide the width."""
    if model.d_model % model.n_heads == 0:
        return None
    divisors = ', '.join(str(i) for i in range(1, min(model.d_model, 128) + 1) if model.d_model % i == 0)
    return f'model.n_heads: {model.n_heads} does not divide model.d_model {model.d_model}; these do: {divisors}'


def model_errors(c: Config, has_gpu: bool) -> Iterator[str]:
    """One line for each mistake in `model`, `fsdp_config` and `compile_config`."""
    if isinstance(c.model, HFCausalLMConfig):
        if c.model.pretrained_model_name_or_path is None and 'model_type' not in c.model.config_overrides:
            yield ('model.pretrained_model_name_or_path: missing; name a model, or set '
                   'model.config_overrides.model_type, as in gpt2')
        yield from (f'model.config_overrides.{key}: {n} must be greater than 0' for key, n in
                    c.model.config_overrides.items() if key in HF_SIZES and isinstance(n, int) and n <= 0)
    elif isinstance(c.model, MosaicGPTConfig):
        if error := heads_error(c.model):
            yield error
        yield from _attention_errors(c, c.model, has_gpu)
        yield from _layer_errors(c, c.model)
    if c.fsdp_config:
        yield from _fsdp_errors(c, c.fsdp_config, has_gpu)
    if c.compile_config:
        yield from _compile_errors(c, c.compile_config, has_gpu)


def _attention_errors(c: Config, model: MosaicGPTConfig, has_gpu: bool) -> Iterator[str]:
    if model.attn_impl == 'flash' and not has_gpu:
        yield FLASH_NEEDS_GPU
    elif model.attn_impl == 'flash' and c.precision == 'fp32':
        yield ("model.attn_impl: 'flash' computes in fp16 or bf16, and precision is 'fp32'; set model.attn_impl=auto, "
               'or precision=amp_bf16')
    if model.flash_kernel != 'auto' and model.attn_impl != 'flash':
        yield (f'model.flash_kernel: {model.flash_kernel!r} is of attn_impl flash, and that is {model.attn_impl!r}; '
               'set model.attn_impl=flash, or flash_kernel=auto')
    if model.flash_kernel in ('flash-attn-3', 'flash-attn-4') and model.attn_pdrop:
        yield (f'model.flash_kernel: {model.flash_kernel!r} has no dropout, and model.attn_pdrop is '
               f'{model.attn_pdrop}; set that to 0, or flash_kernel=auto')


def _layer_errors(c: Config, model: MosaicGPTConfig) -> Iterator[str]:
    """What fp8 cannot compute, and settings that would do nothing."""
    lengths = {f'{name}.dataset.max_seq_len': loader.dataset.max_seq_len for name, loader in loaders(c).items()}
    odd = [f'{key} {n}' for key, n in {'model.d_model': model.d_model, **lengths}.items() if n % 16]
    if model.linear_impl == 'fp8' and odd:
        yield (f"model.linear_impl: 'fp8' takes multiples of 16, and {' and '.join(odd)} is none; change that, or set "
               'plain')
    for key in ('loss_chunk_tokens', 'vocab_multiple') if model.loss_impl == 'plain' else ():
        if getattr(model, key) != MosaicGPTConfig.model_fields[key].default:
            yield (f"model.{key}: {getattr(model, key)} is of loss_impl chunked, and that is 'plain'; remove it, or "
                   'set loss_impl=chunked')
    every, f = model.activation_checkpointing_every, c.fsdp_config
    if every > 1 and not (f and (f.activation_checkpointing or f.activation_cpu_offload)):
        yield (f'model.activation_checkpointing_every: {every} does nothing without '
               'fsdp_config.activation_checkpointing or activation_cpu_offload; set one of them, or this to 1')


def _fsdp_errors(c: Config, f: FSDPConfig, has_gpu: bool) -> Iterator[str]:
    if f.version == 1 and not has_gpu:
        yield 'fsdp_config.version: 1 needs a GPU; leave it unset (null), and CPUs take version 2'
    elif (f.version or (1 if has_gpu else 2)) == 1:
        yield from _version_1_errors(c, f)
    else:
        yield from _version_2_errors(c, f, has_gpu)
    if not f.reduce_every_microbatch and c.device_train_microbatch_size == 'auto':
        yield ('fsdp_config.reduce_every_microbatch: false needs a number as device_train_microbatch_size, which is '
               "'auto'; set one, or true")


def _version_1_errors(c: Config, f: FSDPConfig) -> Iterator[str]:
    if f.sharding_strategy == 'HYBRID_SHARD' and (f.data_parallel_replicate_degree or 1) < 2:
        yield ("fsdp_config.sharding_strategy: 'HYBRID_SHARD' needs data_parallel_replicate_degree, the number of "
               'copies of the model, above 1; without it Composer shards fully')
    if not f.reduce_every_microbatch and f.mixed_precision != 'FULL' and c.precision != 'fp32':
        yield ('fsdp_config.reduce_every_microbatch: false would sum the gradients in low precision in version 1; set '
               'version: 2, or mixed_precision: FULL, or true')
    alone = {'is for state_dict_type: full': f.state_dict_type != 'full',
             'needs sync_module_states: true, by which the other ranks get the weights': not f.sync_module_states,
             'needs model.device: cpu, since rank 0 loads before it shards': getattr(c.model, 'device', '') == 'meta'}
    if f.load_monolith_rank0_only:
        yield from (f'fsdp_config.load_monolith_rank0_only: true {what}' for what, wrong in alone.items() if wrong)


def _version_2_errors(c: Config, f: FSDPConfig, has_gpu: bool) -> Iterator[str]:
    why = 'version 2' if f.version == 2 else 'version 2, which CPUs have'
    if f.sharding_strategy == 'HYBRID_SHARD':
        yield (f"fsdp_config.sharding_strategy: 'HYBRID_SHARD' is not in {why}; set FULL_SHARD, or version: 1 on "
               'GPUs')
    elif f.data_parallel_replicate_degree or f.data_parallel_shard_degree != -1:
        yield (f'fsdp_config.data_parallel_shard_degree and data_parallel_replicate_degree: not in {why}, which shards '
               'over all devices; remove them, or set version: 1 on GPUs')
    if c.device_train_microbatch_size == 'auto' and has_gpu:
        yield "device_train_microbatch_size: 'auto' is not in fsdp_config.version 2; set a number, or version: 1"
    if f.load_monolith_rank0_only:
        yield f'fsdp_config.load_monolith_rank0_only: true is not in {why}; set false'
    if fsdp_version(f, has_gpu) == 0 and (f.activation_checkpointing or f.activation_cpu_offload):
        yield (f"fsdp_config.activation_checkpointing, activation_cpu_offload: not with 'NO_SHARD' of {why}, which is "
               'DDP; set sharding_strategy SHARD_GRAD_OP or FULL_SHARD, or both to false')
    if fsdp_version(f, has_gpu) == 0 and f.state_dict_type == 'sharded':
        yield f"fsdp_config.state_dict_type: 'sharded' is not with 'NO_SHARD' of {why}, which is DDP; set full"


def _compile_errors(c: Config, compiled: CompileConfig, has_gpu: bool) -> Iterator[str]:
    from torch._dynamo import list_backends  # here: it takes a second

    backends = list_backends(exclude_tags=())
    options = {key.replace('-', '_'): value for key, value in (compiled.options or {}).items()}  # as torch.compile does
    if compiled.backend not in backends:
        yield f'compile_config.backend: {compiled.backend!r} is not one of {", ".join(sorted(backends))}'
    if compiled.mode and options:
        yield 'compile_config.mode and options: torch.compile takes one of the two; set the other to null'
    elif options and compiled.backend == 'inductor':
        import torch._inductor

        if unknown := sorted(options.keys() - {*torch._inductor.list_options()}):
            yield (f'compile_config.options: {", ".join(unknown)}: inductor has no such option; '
                   'torch._inductor.list_options() names those that it has')
    graphs = {'mode': compiled.mode in ('reduce-overhead', 'max-autotune'), 'backend': compiled.backend == 'cudagraphs',
              'options': options.get('triton.cudagraphs')}
    for key in graphs if compiled.scope == 'block' else ():
        if graphs[key]:
            yield (f'compile_config.{key}: {getattr(compiled, key)!r} takes CUDA graphs, which blocks that are '
                   'compiled one by one overwrite for each other; set scope: model, or mode: '
                   'max-autotune-no-cudagraphs')
    if compiled.scope == 'model' and c.fsdp_config and c.fsdp_config.activation_checkpointing:
        yield ("compile_config.scope: 'model' leaves blocks whose activations are checkpointed as they are; set block, "
               'or fsdp_config.activation_checkpointing=false')
    if compiled.backend == 'inductor':
        import torch.cuda  # here: it takes a second

        if has_gpu == torch.cuda.is_available():  # else it is an estimate for another machine
            yield from compiler_errors(has_gpu)

"""Checks settings of the model, FSDP and torch.compile that are each valid, but impossible together."""

from collections.abc import Iterator
from typing import Optional

from src.common.machine import compiler_errors
from src.config.data_checks import loader_sections
from src.config.derived import fsdp_version, modern_shape
from src.config.schema import CompileConfig, Config, FSDPConfig, GPTConfig, HFCausalLMConfig, ModernGPTConfig

HF_SIZES = ('n_embd', 'n_layer', 'n_head', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'vocab_size')
FLASH_NEEDS_GPU = "model.attn_impl: 'flash' needs a GPU; set model.attn_impl=auto (or sdpa)"


def not_a_divisor(name: str, value: int, whole: str, n: int) -> str:
    """The message for a setting that does not divide another one, with the divisors up to 128."""
    divisors = ', '.join(str(i) for i in range(1, min(n, 128) + 1) if n % i == 0)
    return f'model.{name}: {value} does not divide model.{whole} {n}; these do: {divisors}'


def heads_error(model: GPTConfig) -> Optional[str]:
    """The message for numbers or sizes of heads that the model cannot have; None if there is no mistake."""
    if isinstance(model, ModernGPTConfig):
        head_dim, n_kv_heads, _ = modern_shape(model)
        if model.n_heads % n_kv_heads:
            return not_a_divisor('n_kv_heads', n_kv_heads, 'n_heads', model.n_heads)
        if model.head_dim is not None or model.d_model % model.n_heads == 0:
            return None if head_dim % 2 == 0 else (
                f'model.head_dim: {head_dim} (if not set, d_model / n_heads) is odd, but RoPE turns pairs of features; '
                'set an even number')
    if model.d_model % model.n_heads == 0:
        return None
    return not_a_divisor('n_heads', model.n_heads, 'd_model', model.d_model)


def model_errors(c: Config, has_gpu: bool) -> Iterator[str]:
    """One line for each mistake in `model`, `fsdp_config` and `compile_config`."""
    if isinstance(c.model, HFCausalLMConfig):
        if c.model.pretrained_model_name_or_path is None and 'model_type' not in c.model.config_overrides:
            yield ('model.pretrained_model_name_or_path: missing; set a name on the hub or a folder, or set '
                   'model.config_overrides.model_type, such as gpt2')
        yield from (f'model.config_overrides.{key}: {n} must be greater than 0' for key, n in
                    c.model.config_overrides.items() if key in HF_SIZES and isinstance(n, int) and n <= 0)
    elif isinstance(c.model, GPTConfig):
        if error := heads_error(c.model):
            yield error
        yield from _attention_errors(c, c.model, has_gpu)
        yield from _layer_errors(c, c.model)
    if c.fsdp_config:
        yield from _fsdp_errors(c, c.fsdp_config, has_gpu)
    if c.compile_config:
        yield from _compile_errors(c, c.compile_config, has_gpu)


def _attention_errors(c: Config, model: GPTConfig, has_gpu: bool) -> Iterator[str]:
    if model.attn_impl == 'flash' and not has_gpu:
        yield FLASH_NEEDS_GPU
    elif model.attn_impl == 'flash' and c.precision == 'fp32':
        yield ("model.attn_impl: 'flash' computes in fp16 or bf16, but precision is 'fp32'; set model.attn_impl=auto, "
               'or precision=amp_bf16')
    if model.flash_kernel != 'auto' and model.attn_impl != 'flash':
        yield (f'model.flash_kernel: {model.flash_kernel!r} works only with model.attn_impl=flash, but that is '
               f'{model.attn_impl!r}; set model.attn_impl=flash, or model.flash_kernel=auto')
    if model.flash_kernel in ('flash-attn-3', 'flash-attn-4') and (dropout := getattr(model, 'attn_pdrop', 0)):
        yield (f'model.flash_kernel: {model.flash_kernel!r} has no dropout, but model.attn_pdrop is '
               f'{dropout}; set model.attn_pdrop=0, or model.flash_kernel=auto')


def _layer_errors(c: Config, model: GPTConfig) -> Iterator[str]:
    """Shapes that fp8 cannot compute, and settings that would have no effect."""
    lengths = {f'{name}.dataset.max_seq_len': loader.dataset.max_seq_len for name, loader in loader_sections(c).items()}
    if isinstance(model, ModernGPTConfig):
        head_dim, n_kv_heads, lengths['model.d_hidden'] = modern_shape(model)
        lengths['model.n_heads * head_dim'] = model.n_heads * head_dim
        lengths['(model.n_heads + 2 * n_kv_heads) * head_dim'] = (model.n_heads + 2 * n_kv_heads) * head_dim
    uneven = [f'{key} is {n}' for key, n in {'model.d_model': model.d_model, **lengths}.items() if n % 16]
    if model.linear_impl == 'fp8' and uneven:
        yield (f"model.linear_impl: 'fp8' needs multiples of 16, but {' and '.join(uneven)}; change the value, or set "
               'model.linear_impl=plain')
    chunk = model.loss_chunk_tokens
    if model.loss_impl == 'plain' and chunk != GPTConfig.model_fields['loss_chunk_tokens'].default:
        yield (f"model.loss_chunk_tokens: {chunk} works only with model.loss_impl=chunked, but that is 'plain'; remove "
               'loss_chunk_tokens, or set model.loss_impl=chunked')
    capped = isinstance(model, ModernGPTConfig) and model.logit_softcap is not None
    for key in ('loss_impl', 'loss_chunk_tokens', 'vocab_multiple') if capped else ():
        if getattr(model, key) != GPTConfig.model_fields[key].default:
            yield (f'model.{key}: {getattr(model, key)!r} has no effect with model.logit_softcap, whose loss holds all '
                   f'logits; remove {key}, or set model.logit_softcap=null')
    every, f = model.activation_checkpointing_every, c.fsdp_config
    if every > 1 and not (f and (f.activation_checkpointing or f.activation_cpu_offload)):
        yield (f'model.activation_checkpointing_every: {every} has no effect without activation checkpointing; set '
               'fsdp_config.activation_checkpointing=true, or model.activation_checkpointing_every=1')


def _fsdp_errors(c: Config, f: FSDPConfig, has_gpu: bool) -> Iterator[str]:
    if f.version == 1 and c.optimizer.name == 'muon':
        yield ("optimizer.name: 'muon' needs whole matrices, which fsdp_config.version 1 flattens; set "
               'fsdp_config.version=2 (also what null means with muon)')
    elif f.version == 1 and not has_gpu:
        yield 'fsdp_config.version: 1 needs a GPU; set fsdp_config.version=null, which is version 2 on CPUs'
    elif (f.version or (1 if has_gpu else 2)) == 1:
        yield from _version_1_errors(c, f)
    else:
        yield from _version_2_errors(c, f, has_gpu)
    if not f.reduce_every_microbatch and c.device_train_microbatch_size == 'auto':
        yield ('fsdp_config.reduce_every_microbatch: false needs a number in device_train_microbatch_size, but that '
               "is 'auto'; set a number, or fsdp_config.reduce_every_microbatch=true")


def _version_1_errors(c: Config, f: FSDPConfig) -> Iterator[str]:
    if f.sharding_strategy == 'HYBRID_SHARD' and (f.data_parallel_replicate_degree or 1) < 2:
        yield ("fsdp_config.sharding_strategy: 'HYBRID_SHARD' needs fsdp_config.data_parallel_replicate_degree, the "
               'number of copies of the model; set 2 or more (without it Composer uses FULL_SHARD)')
    if not f.reduce_every_microbatch and f.mixed_precision != 'FULL' and c.precision != 'fp32':
        yield ('fsdp_config.reduce_every_microbatch: false would sum the gradients in low precision in FSDP version 1; '
               'in fsdp_config set version=2, mixed_precision=FULL or reduce_every_microbatch=true')
    unmet = {'fsdp_config.state_dict_type=full': f.state_dict_type != 'full',
             'fsdp_config.sync_module_states=true, to send the weights to the other ranks': not f.sync_module_states,
             'model.device=cpu, because rank 0 loads the weights before it shards them':
                 getattr(c.model, 'device', '') == 'meta'}
    if f.load_monolith_rank0_only:
        yield from (f'fsdp_config.load_monolith_rank0_only: true needs {need}' for need, is_unmet in unmet.items()
                    if is_unmet)


def _version_2_errors(c: Config, f: FSDPConfig, has_gpu: bool) -> Iterator[str]:
    is_muon = c.optimizer.name == 'muon'
    only = 'with muon' if is_muon else '' if f.version == 2 else 'on CPUs'
    version = f'FSDP version 2 (the only one {only})' if only else 'FSDP version 2'
    other = '' if is_muon else ', or on GPUs fsdp_config.version=1'
    if f.sharding_strategy == 'HYBRID_SHARD':
        yield f"fsdp_config.sharding_strategy: {version} has no 'HYBRID_SHARD'; set FULL_SHARD{other}"
    elif f.data_parallel_replicate_degree or f.data_parallel_shard_degree != -1:
        yield (f'fsdp_config.data_parallel_shard_degree and data_parallel_replicate_degree: {version} always shards '
               f'over all devices; remove both keys{other}')
    if c.device_train_microbatch_size == 'auto' and has_gpu:
        yield f"device_train_microbatch_size: {version} has no 'auto'; set a number{other}"
    if f.load_monolith_rank0_only:
        yield f'fsdp_config.load_monolith_rank0_only: {version} cannot do this; set false'
    if fsdp_version(f, has_gpu) == 0 and (f.activation_checkpointing or f.activation_cpu_offload):
        yield (f"fsdp_config.activation_checkpointing, activation_cpu_offload: 'NO_SHARD' in {version} is DDP, which "
               'has neither; set fsdp_config.sharding_strategy to SHARD_GRAD_OP or FULL_SHARD, or both keys to false')
    if fsdp_version(f, has_gpu) == 0 and f.state_dict_type == 'sharded':
        yield f"fsdp_config.state_dict_type: 'NO_SHARD' in {version} is DDP, which cannot save 'sharded'; set full"


def _compile_errors(c: Config, compiled: CompileConfig, has_gpu: bool) -> Iterator[str]:
    from torch._dynamo import list_backends  # not at the top: the import takes a second

    backends = list_backends(exclude_tags=())
    options = {key.replace('-', '_'): value for key, value in (compiled.options or {}).items()}  # as torch.compile does
    if compiled.backend not in backends:
        yield f'compile_config.backend: {compiled.backend!r} is not one of {", ".join(sorted(backends))}'
    if compiled.mode and options:
        yield 'compile_config.mode and options: torch.compile takes only one of the two; set the other to null'
    elif options and compiled.backend == 'inductor':
        import torch._inductor

        if unknown := sorted(options.keys() - {*torch._inductor.list_options()}):
            yield (f'compile_config.options: {", ".join(unknown)}: inductor has no such option; '
                   'torch._inductor.list_options() returns all options')
    graphs = {'mode': compiled.mode in ('reduce-overhead', 'max-autotune'), 'backend': compiled.backend == 'cudagraphs',
              'options': options.get('triton.cudagraphs')}
    for key in graphs if compiled.scope != 'model' else ():
        if graphs[key]:
            yield (f'compile_config.{key}: {getattr(compiled, key)!r} uses CUDA graphs; with scope: block each block '
                   "would overwrite the other blocks' memory; set compile_config.scope=model, or "
                   'compile_config.mode=max-autotune-no-cudagraphs')
    if compiled.scope == 'model' and c.fsdp_config and c.fsdp_config.activation_checkpointing:
        yield ("compile_config.scope: 'model' does not compile blocks with activation checkpointing; set "
               'compile_config.scope=block, or fsdp_config.activation_checkpointing=false')
    if compiled.backend == 'inductor' and compiled.scope != 'auto':
        import torch.cuda  # not at the top: the import takes a second

        if has_gpu == torch.cuda.is_available():  # False: the estimate of a run on another machine
            yield from compiler_errors(has_gpu)

"""Settings that are valid one by one and impossible together, on this machine, or with what lies on the disk."""

import math
import os
import re
from collections.abc import Collection, Mapping
from fractions import Fraction
from typing import Optional

from src.common.errors import UserError
from src.common.machine import compiler_errors, not_writable
from src.config.data_places import columns_of, is_copied, is_url, only_copy, stream_errors, streams_of
from src.config.derived import device_batch_size
from src.config.schema import (
    TIME,
    CompileConfig,
    Config,
    DatasetConfig,
    FSDPConfig,
    HFCausalLMConfig,
    LoaderConfig,
    MosaicGPTConfig,
)

HF_SIZES = ('n_embd', 'n_layer', 'n_head', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'vocab_size')


def fsdp_version(cfg: Optional[FSDPConfig], has_gpu: bool) -> int:
    """1 or 2: of FSDP; 0: DDP. FSDP1 needs GPUs, so CPUs shard by version 2."""
    if cfg is None:
        return 0
    version = cfg.version or (1 if has_gpu else 2)
    return 0 if version == 2 and cfg.sharding_strategy == 'NO_SHARD' else version


def combination_errors(c: Config, world_size: int, has_gpu: bool, num_nodes: int = 1,
                       kits_loader: bool = True) -> list[str]:
    """Settings that are valid alone and impossible together, or on this machine.

    A loader of the user's own may read something else than sections `dataset` name: those are the kit's loader's.
    """
    out = _model_errors(c, has_gpu)
    if c.fsdp_config:
        out += _fsdp_errors(c, c.fsdp_config, has_gpu)
    nodes = c.train_loader.dataset.num_canonical_nodes
    packed = kits_loader and packs_on_the_fly(c.train_loader.dataset)
    if packed and nodes % num_nodes and num_nodes % nodes:
        out.append(f'train_loader.dataset.num_canonical_nodes: {nodes} neither divides nor is divided by the {num_nodes} nodes; '
                   f'set a multiple of the numbers of nodes that the run will have, such as {nodes * num_nodes}')
    for name, loader in (('train_loader', c.train_loader), ('eval_loader', c.eval_loader)):
        if loader is not None:
            out += _loader_errors(c, name, loader) + (_dataset_errors(c, name, loader.dataset) if kits_loader else [])
    if kits_loader and c.eval_loader:
        out += _split_errors(c, c.train_loader.dataset, c.eval_loader.dataset)
    out += _evaluation_errors(c) + _unit_errors(c, packed) + _machine_errors(c, world_size, has_gpu)
    return out + _place_errors(c)


def _model_errors(c: Config, has_gpu: bool) -> list[str]:
    out, model = [], c.model
    if isinstance(model, HFCausalLMConfig):
        if model.pretrained_model_name_or_path is None and 'model_type' not in model.config_overrides:
            out.append('model.pretrained_model_name_or_path: missing; name a model, or set '
                       'model.config_overrides.model_type, as in gpt2')
        out += [f'model.config_overrides.{key}: {n} must be greater than 0' for key, n in model.config_overrides.items()
                if key in HF_SIZES and isinstance(n, int) and n <= 0]
    elif isinstance(model, MosaicGPTConfig):
        if model.d_model % model.n_heads:
            divisors = ', '.join(str(i) for i in range(1, min(model.d_model, 128) + 1) if model.d_model % i == 0)
            out.append(f'model.n_heads: {model.n_heads} does not divide model.d_model {model.d_model}; these do: {divisors}')
        if model.attn_impl == 'flash' and not has_gpu:
            out.append("model.attn_impl: 'flash' needs a GPU; set model.attn_impl=auto (or sdpa)")
        elif model.attn_impl == 'flash' and c.precision == 'fp32':
            out.append("model.attn_impl: 'flash' computes in fp16 or bf16, and precision is 'fp32'; set model.attn_impl=auto, "
                       'or precision=amp_bf16')
        lengths = {f'{name}.dataset.max_seq_len': loader.dataset.max_seq_len for name, loader in
                   (('train_loader', c.train_loader), ('eval_loader', c.eval_loader)) if loader}
        odd = [f'{key} {n}' for key, n in {'model.d_model': model.d_model, **lengths}.items() if n % 16]
        if model.linear_impl == 'fp8' and odd:
            out.append(f"model.linear_impl: 'fp8' takes multiples of 16, and {' and '.join(odd)} is none; change that, or set "
                       'plain')
        if model.loss_impl == 'plain':
            out += [f"model.{key}: {getattr(model, key)} is of loss_impl chunked, and that is 'plain'; remove it, or set "
                    'loss_impl=chunked' for key in ('loss_chunk_tokens', 'vocab_multiple')
                    if getattr(model, key) != MosaicGPTConfig.model_fields[key].default]
        f = c.fsdp_config
        if model.activation_checkpointing_every > 1 and not (f and (f.activation_checkpointing or f.activation_cpu_offload)):
            out.append(f'model.activation_checkpointing_every: {model.activation_checkpointing_every} does nothing without '
                       'fsdp_config.activation_checkpointing or activation_cpu_offload; set one of them, or this to 1')
        if model.flash_kernel != 'auto' and model.attn_impl != 'flash':
            out.append(f'model.flash_kernel: {model.flash_kernel!r} is of attn_impl flash, and that is {model.attn_impl!r}; set '
                       'model.attn_impl=flash, or flash_kernel=auto')
        if model.flash_kernel in ('flash-attn-3', 'flash-attn-4') and model.attn_pdrop:
            out.append(f'model.flash_kernel: {model.flash_kernel!r} has no dropout, and model.attn_pdrop is {model.attn_pdrop}; '
                       'set that to 0, or flash_kernel=auto')
    return out


def _fsdp_errors(c: Config, f: FSDPConfig, has_gpu: bool) -> list[str]:
    out, version = [], f.version or (1 if has_gpu else 2)
    why = 'version 2' if f.version == 2 else 'version 2, which CPUs have'
    if f.version == 1 and not has_gpu:
        out.append('fsdp_config.version: 1 needs a GPU; leave it unset (null), and CPUs take version 2')
    elif version == 2 and f.sharding_strategy == 'HYBRID_SHARD':
        out.append(f"fsdp_config.sharding_strategy: 'HYBRID_SHARD' is not in {why}; set FULL_SHARD, or version: 1 on GPUs")
    elif version == 2 and (f.data_parallel_replicate_degree or f.data_parallel_shard_degree != -1):
        out.append(f'fsdp_config.data_parallel_shard_degree and data_parallel_replicate_degree: not in {why}, which shards over '
                   'all devices; remove them, or set version: 1 on GPUs')
    elif version == 1 and f.sharding_strategy == 'HYBRID_SHARD' and (f.data_parallel_replicate_degree or 1) < 2:
        out.append("fsdp_config.sharding_strategy: 'HYBRID_SHARD' needs data_parallel_replicate_degree, the number of copies of "
                   'the model, above 1; without it Composer shards fully')
    if version == 2 and c.device_train_microbatch_size == 'auto' and has_gpu:
        out.append("device_train_microbatch_size: 'auto' is not in fsdp_config.version 2; set a number, or version: 1")
    if not f.reduce_every_microbatch and version == 1 and f.mixed_precision != 'FULL' and c.precision != 'fp32':
        out.append('fsdp_config.reduce_every_microbatch: false would sum the gradients in low precision in version 1; set '
                   'version: 2, or mixed_precision: FULL, or true')
    if not f.reduce_every_microbatch and c.device_train_microbatch_size == 'auto':
        out.append('fsdp_config.reduce_every_microbatch: false needs a number as device_train_microbatch_size, which is '
                   "'auto'; set one, or true")
    if fsdp_version(f, has_gpu) == 0 and (f.activation_checkpointing or f.activation_cpu_offload):
        out.append(f"fsdp_config.activation_checkpointing, activation_cpu_offload: not with 'NO_SHARD' of {why}, which is DDP; "
                   'set sharding_strategy SHARD_GRAD_OP or FULL_SHARD, or both to false')
    if fsdp_version(f, has_gpu) == 0 and f.state_dict_type == 'sharded':
        out.append(f"fsdp_config.state_dict_type: 'sharded' is not with 'NO_SHARD' of {why}, which is DDP; set full")
    if f.load_monolith_rank0_only and version == 2:
        out.append(f'fsdp_config.load_monolith_rank0_only: true is not in {why}; set false')
    elif f.load_monolith_rank0_only:
        if f.state_dict_type != 'full':
            out.append("fsdp_config.load_monolith_rank0_only: true is for state_dict_type: full")
        if not f.sync_module_states:
            out.append('fsdp_config.load_monolith_rank0_only: true needs sync_module_states: true, by which the other ranks get '
                       'the weights')
        if getattr(c.model, 'device', 'cpu') == 'meta':
            out.append('fsdp_config.load_monolith_rank0_only: true needs model.device: cpu, since rank 0 loads before it shards')
    return out


def _loader_errors(c: Config, name: str, loader: LoaderConfig) -> list[str]:
    out, data = [], loader.dataset
    if isinstance(c.model, MosaicGPTConfig) and data.max_seq_len > c.model.max_seq_len:
        out.append(f'{name}.dataset.max_seq_len: {data.max_seq_len} is above model.max_seq_len {c.model.max_seq_len}; '
                   f'set model.max_seq_len={data.max_seq_len}, or {name}.dataset.max_seq_len={c.model.max_seq_len}')
    if loader.num_workers == 0:
        for key in ('prefetch_factor', 'persistent_workers', 'timeout'):
            if value := getattr(loader, key):
                out.append(f'{name}.{key}: {value!r} needs worker processes; set {name}.num_workers above 0, or remove it')
    return out


def _dataset_errors(c: Config, name: str, data: DatasetConfig) -> list[str]:
    out = [f'{name}.{error}' for error in stream_errors(data)]
    if data.cache_limit is not None and not all(is_copied(stream.remote, stream.local, stream.split)
                                            for stream in streams_of(data).values()):
        out.append(only_copy(f'{name}.dataset', data.cache_limit))
    within = getattr(c.model, 'attn_within_document', None)  # None: a model without it
    if within is None and data.sequence_ids:
        out.append(f"{name}.dataset.sequence_ids: true is for model.name: mosaic_gpt, and this is {c.model.name!r}, which would "
                   f'attend across documents; set {name}.dataset.sequence_ids=false')
    elif within is not None and within != data.sequence_ids:
        out.append(f'model.attn_within_document: {str(within).lower()} does not go with {name}.dataset.sequence_ids '
                   f'{str(data.sequence_ids).lower()}; write sequence_ids: ${{model.attn_within_document}} in both datasets')
    return out


def packs_on_the_fly(data: DatasetConfig) -> bool:
    """Whether samples are packed while documents are read. Data that cannot be read is taken for text."""
    columns = [columns_of(place) for place in _places(data)[:data.group_method == 'concat']]
    return data.group_method == 'concat' and not any('tokens' in (names or ()) for names in columns)


def _places(data: DatasetConfig) -> list[str]:
    """Where each stream of a split is read from, in one spelling."""
    paths = (os.path.join(stream.remote or stream.local, stream.split or '') for stream in streams_of(data).values())
    return [path if is_url(path) else os.path.realpath(path) for path in paths]


def _split_errors(c: Config, train: DatasetConfig, evals: DatasetConfig) -> list[str]:
    out = []
    if packs_on_the_fly(evals):
        out.append("eval_loader.dataset.group_method: 'concat' has no fixed set of samples to evaluate; "
                   'set truncate, or evaluate on packed tokens')
    if set(_places(train)) & set(_places(evals)) and not c.allow_same_split:
        out.append(f'eval_loader.dataset.split: {evals.split!r} is also what train_loader reads, so the evaluation would be '
                   'of the training data; change one, or set allow_same_split=true if that is what you want')
    return out


def _evaluation_errors(c: Config) -> list[str]:
    out = []
    if 'eval_samples' in c.train_loader.model_fields_set:
        out.append(f'train_loader.eval_samples: {c.train_loader.eval_samples} bounds an evaluation; '
                   'set it for eval_loader, and train_loader.dataset.epoch_size for training')
    if c.eval_loader is None:
        return out
    if c.eval_loader.eval_samples != c.eval_samples:
        out.append(f'eval_samples: {c.eval_samples} is not what eval_loader.eval_samples says, {c.eval_loader.eval_samples}; '
                   'write eval_samples: ${eval_samples} in eval_loader')
    if c.eval_samples == 0:
        out.append('eval_samples: 0 would evaluate nothing; set a number above 0, -1 for all, or eval_loader=null')
    if c.device_eval_batch_size is None and c.device_train_microbatch_size == 'auto':
        out.append("device_eval_batch_size: missing; its default is device_train_microbatch_size, and that is 'auto', "
                   'which is searched in training alone; set a number')
    return out


def _long_warmup(c: Config) -> str:
    return (f'scheduler.t_warmup: {c.scheduler.t_warmup!r} is not shorter than the run (max_duration {c.max_duration!r}), which '
            'would end before the learning rate reaches its peak; set a shorter one, such as scheduler.t_warmup=0.1dur')


def _short_t_max(c: Config) -> str:
    return f'scheduler.t_max: {c.scheduler.t_max!r} must be at least max_duration {c.max_duration!r}, or 1dur'


def check_warmup(c: Config, epoch: Optional[int]) -> None:
    """Refuses a warm-up in epochs or batches that is not shorter than a run in the other unit, and a t_max that is.

    Args:
        c: The config.
        epoch: Its batches; None where the training loader has no length.
    """
    batches = {'ba': 1, 'ep': math.nan if epoch is None else epoch}
    times = map(TIME.fullmatch, (c.scheduler.t_warmup, c.scheduler.t_max, c.max_duration))
    warmup, t_max, run = (float(m[1]) * batches.get(m[2], math.nan) for m in times if m)
    if warmup >= run:
        raise UserError(_long_warmup(c))
    if t_max < run:
        raise UserError(_short_t_max(c))


def in_units_of_the_run(interval: str, max_duration: str) -> str:
    """A fraction of the run as a number of batches, samples or tokens; any other interval as it is.

    Composer cannot divide a run whose loader has no length, as where text is packed on the fly.
    """
    fraction, run = TIME.fullmatch(interval), TIME.fullmatch(max_duration)
    if not fraction or not run or fraction[2] != 'dur' or run[2] == 'ep':
        return interval
    return f'{math.ceil(Fraction(fraction[1]) * int(run[1]))}{run[2]}'


def _unit_errors(c: Config, packed: bool) -> list[str]:
    out = []
    times = (c.max_duration, c.scheduler.t_warmup, c.scheduler.t_max)
    duration, warmup, t_max = ((float(m[1]), m[2]) for m in map(TIME.match, times) if m)
    alike = ({duration[1]}, {duration[1], 'dur'}) if packed else ({duration[1]}, {duration[1], 'dur'}, {'ba', 'ep'})
    if duration[1] == 'dur':
        out.append(f'max_duration: {c.max_duration!r} is a fraction of itself; use ba, tok, sp or ep')
    elif duration[1] == 'ep' and packed:
        out.append(f"max_duration: {c.max_duration!r}: with group_method 'concat' an epoch has no length to schedule by; "
                   'give batches (ba) or tokens (tok)')
    elif {warmup[1], duration[1]} not in alike or {t_max[1], duration[1]} not in alike:
        out.append(f'scheduler.t_warmup: {c.scheduler.t_warmup!r} and max_duration {c.max_duration!r} must have one unit; '
                   f'give t_warmup (and t_max) in {duration[1]}, or as a fraction such as 0.02dur')
    else:
        if warmup[0] >= {duration[1]: duration[0], 'dur': 1.0}.get(warmup[1], math.inf):
            out.append(_long_warmup(c))
        if t_max[0] < {duration[1]: duration[0], 'dur': 1.0}.get(t_max[1], 0.0):
            out.append(_short_t_max(c))
    for key in ('max_duration', 'eval_interval', 'save_interval'):
        amount = TIME.match(getattr(c, key))
        if amount and not float(amount[1]):
            out.append(f'{key}: {getattr(c, key)!r} must be greater than 0')
    if len(c.optimizer.betas) != 2 or not all(0 <= b < 1 for b in c.optimizer.betas):
        out.append(f'optimizer.betas: {c.optimizer.betas} must be two numbers from 0 up to, not including, 1')
    return out


def _compile_errors(c: Config, compiled: CompileConfig) -> list[str]:
    from torch._dynamo import list_backends  # here: it takes a second

    out, backends = [], list_backends(exclude_tags=())
    options = {key.replace('-', '_'): value for key, value in (compiled.options or {}).items()}  # as torch.compile reads them
    if compiled.backend not in backends:
        out.append(f'compile_config.backend: {compiled.backend!r} is not one of {", ".join(sorted(backends))}')
    if compiled.mode and compiled.options:
        out.append('compile_config.mode and options: torch.compile takes one of the two; set the other to null')
    elif options and compiled.backend == 'inductor':
        import torch._inductor

        if unknown := sorted(options.keys() - {*torch._inductor.list_options()}):
            out.append(f'compile_config.options: {", ".join(unknown)}: inductor has no such option; '
                       'torch._inductor.list_options() names those that it has')
    graphs = {'mode': compiled.mode if compiled.mode in ('reduce-overhead', 'max-autotune') else None,
              'backend': compiled.backend if compiled.backend == 'cudagraphs' else None,
              'options': options if options.get('triton.cudagraphs') else None}
    if compiled.scope == 'block':
        out += [f'compile_config.{key}: {value!r} takes CUDA graphs, which blocks that are compiled one by one overwrite for '
                'each other; set scope: model, or mode: max-autotune-no-cudagraphs' for key, value in graphs.items() if value]
    elif c.fsdp_config and c.fsdp_config.activation_checkpointing:
        out.append("compile_config.scope: 'model' leaves blocks whose activations are checkpointed as they are; set block, or "
                   'fsdp_config.activation_checkpointing=false')
    return out


def _machine_errors(c: Config, world_size: int, has_gpu: bool) -> list[str]:
    out = []
    micro = c.device_train_microbatch_size
    if micro == 'auto':
        if not has_gpu:
            out.append("device_train_microbatch_size: 'auto' needs a GPU (it searches for what fits); set a number")
    elif micro <= 0:
        out.append(f"device_train_microbatch_size: {micro} must be greater than 0, or 'auto' on a GPU")
    if not has_gpu and c.precision not in ('auto', 'fp32'):
        out.append(f'precision: {c.precision!r} needs a GPU; on a CPU set auto or fp32')
    try:
        device_batch_size(c.global_train_batch_size, world_size)
    except UserError as e:
        out.append(str(e))
    chosen = {name for name, kwargs in c.callbacks.items() if kwargs is not False}
    ema = c.algorithms.get('ema') or {}
    if ema.get('half_life', '') is None and not ema.get('update_interval'):
        out.append('algorithms.ema.update_interval: missing; without half_life it has no default; set one, such as 1ba')
    if c.tokenizer is None and 'text_samples' in chosen:
        out.append('callbacks.text_samples: writes with the tokenizer, which is null; set callbacks.text_samples=false')
    out += [f'callbacks.{name}: needs a GPU, whose memory it records; set callbacks.{name}=false'
            for name in ('memory_snapshot', 'oom_observer') if name in chosen and not has_gpu]
    if {'memory_snapshot', 'oom_observer'} <= chosen and has_gpu:
        out.append('callbacks.oom_observer: remembers nothing once callbacks.memory_snapshot has ended; set one of them to false')
    if 'profiler' in chosen and micro == 'auto':
        out.append("callbacks.profiler: does not go with device_train_microbatch_size: 'auto'; set a number, or "
                   'callbacks.profiler=false')
    out += _compile_errors(c, c.compile_config) if c.compile_config else []
    if c.compile_config and c.compile_config.backend == 'inductor':
        import torch.cuda  # here: it takes a second

        if has_gpu == torch.cuda.is_available():  # else it is an estimate for another machine
            out += compiler_errors(has_gpu)
    if c.autoresume and (c.save_folder is None or run_name(c) is None):
        out.append('autoresume: true needs save_folder and run_name, so that a later start finds the checkpoints')
    if c.save_num_checkpoints_to_keep == 0:
        out.append('save_num_checkpoints_to_keep: 0 would keep none; set 1 or more, or -1 for all')
    elif c.save_num_checkpoints_to_keep > 0 and '://' in (c.save_folder or '') and not (c.save_folder or '').startswith('s3://'):
        out.append(f'save_num_checkpoints_to_keep: {c.save_num_checkpoints_to_keep} works on disks and on s3://; for '
                   f'{c.save_folder} set -1, which keeps all')
    if c.load_weights_only and c.load_path is None:
        out.append('load_weights_only: true does nothing without load_path')
    return out


def run_name(c: Config) -> Optional[str]:
    """The run's name as Composer will find it; None: it makes one up."""
    return c.run_name or os.environ.get('COMPOSER_RUN_NAME') or os.environ.get('RUN_NAME')


def _place_errors(c: Config) -> list[str]:
    """Names that no shell reads, and fields in braces that are not filled in."""
    places = {'save_folder': c.save_folder, 'load_path': c.load_path, **{
        f'loggers.{name}.{key}': kwargs[key] for name, kwargs in c.loggers.items() if kwargs
        for key in ('log_dir', 'filename') if isinstance(kwargs.get(key), str)}}
    out = []
    for key, text in ((key, text) for key, text in places.items() if text):
        if text.lower() in ('none', 'null', 'false', 'off', 'no'):
            out.append(f'{key}: {text!r} would be a file or folder of this name; write {key}=null, or ./{text} if you '
                       'mean it')
        elif re.search(r'^~|\$[A-Za-z_{(]', text):
            out.append(f'{key}: {text!r} is read as it stands, for no shell expands it; write ${{oc.env:HOME}}/..., or '
                       'the whole path')
        elif re.match(r'[a-z][a-z0-9]+:/(?!/)', text):
            out.append(f'{key}: {text!r} would be a folder on the disk; write an address with two slashes, as in '
                       's3://bucket/x')
    same_on_all = ['run_name', 'world_size', 'local_world_size']
    for key, fields in {'save_folder': same_on_all,
                        'loggers.file.filename': [*same_on_all, 'rank', 'local_rank', 'node_rank']}.items():
        text = places.get(key) or ''
        if set(re.sub(rf'{{({"|".join(fields)})(:[^}}]*)?}}', '', text)) & set('{}'):
            out.append(f'{key}: {text!r} has braces around something else than {", ".join(fields)}; write one of '
                       'these, as in {run_name}, or no braces')
    if set(run_name(c) or '') & set('{}'):
        out.append(f'run_name: {run_name(c)!r} has braces, which stand for a field in the names of files; write it '
                   'without (it may be of $COMPOSER_RUN_NAME)')
    return out


def check_save_folder(c: Config) -> None:
    """Refuses a folder on this disk that cannot be made or written."""
    from composer.utils import format_name_with_dist  # here: it takes seconds

    if c.save_folder is None or '://' in c.save_folder:
        return
    name = run_name(c)
    if wrong := not_writable(format_name_with_dist(c.save_folder, name) if name else c.save_folder.split('{')[0]):
        raise UserError(f'save_folder: {c.save_folder} cannot be made or written: {wrong} is no folder that may be '
                        'written')


def check_early_stopper(c: Config, metrics: Mapping[str, Collection[str]]) -> None:
    """Refuses a metric or a loader that there is none of: the stopper would fail at its first look, or never look."""
    stopper = c.callbacks.get('early_stopper') or {}
    for key, known in (('dataloader_label', metrics), ('monitor', metrics.get(str(stopper.get('dataloader_label')), ()))):
        if key in stopper and stopper[key] not in known:
            raise UserError(f'callbacks.early_stopper.{key}: {stopper[key]!r} is not one of {", ".join(map(repr, known))}')


def check_seq_len(c: Config, max_positions: Optional[int]) -> None:
    """Refuses sequences that the model has no positions for; a Hugging Face model's limit is known once it is built."""
    for name, loader in (('train_loader', c.train_loader), ('eval_loader', c.eval_loader)):
        if loader and max_positions and loader.dataset.max_seq_len > max_positions:
            raise UserError(f'{name}.dataset.max_seq_len: {loader.dataset.max_seq_len} is above the {max_positions} '
                            'positions of the model; set a smaller max_seq_len, or more positions in model.config_overrides')

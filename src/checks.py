"""Settings that are valid one by one and impossible together, on this machine, or with what lies on the disk."""

import importlib.util
import os
from pathlib import Path
from typing import Optional

from src.batch_size import device_batch_size
from src.errors import UserError
from src.schema import TIME, Config, DatasetConfig, HFCausalLMConfig, LoaderConfig, MosaicGPTConfig


def combination_errors(c: Config, world_size: int, has_gpu: bool) -> list[str]:
    """Settings that are valid alone and impossible together, or on this machine."""
    out = _model_errors(c, has_gpu)
    for name, loader in (('train_loader', c.train_loader), ('eval_loader', c.eval_loader)):
        if loader is not None:
            out += _loader_errors(c, name, loader)
    return out + _split_errors(c) + _unit_errors(c) + _machine_errors(c, world_size, has_gpu)


def _model_errors(c: Config, has_gpu: bool) -> list[str]:
    out, model = [], c.model
    if isinstance(model, HFCausalLMConfig):
        if model.pretrained_model_name_or_path is None and 'model_type' not in model.config_overrides:
            out.append('model.pretrained_model_name_or_path: missing; name a model, or set '
                       'model.config_overrides.model_type, as in gpt2')
    elif isinstance(model, MosaicGPTConfig):
        if model.d_model % model.n_heads:
            divisors = ', '.join(str(i) for i in range(1, min(model.d_model, 128) + 1) if model.d_model % i == 0)
            out.append(f'model.n_heads: {model.n_heads} does not divide model.d_model {model.d_model}; these do: {divisors}')
        if model.attn_impl == 'flash' and not has_gpu:
            out.append("model.attn_impl: 'flash' needs a GPU; set model.attn_impl=auto (or sdpa)")
        elif model.attn_impl == 'flash' and c.precision == 'fp32':
            out.append("model.attn_impl: 'flash' computes in fp16 or bf16, and precision is 'fp32'; set model.attn_impl=auto, "
                       'or precision=amp_bf16')
    return out


def _loader_errors(c: Config, name: str, loader: LoaderConfig) -> list[str]:
    out, data = [], loader.dataset
    if isinstance(c.model, MosaicGPTConfig) and data.max_seq_len > c.model.max_seq_len:
        out.append(f'{name}.dataset.max_seq_len: {data.max_seq_len} is above model.max_seq_len {c.model.max_seq_len}; '
                   'set max_seq_len, which both refer to')
    if data.cache_limit is not None and _place(data) == os.path.realpath(os.path.join(data.local, data.split)):
        out.append(f'{name}.dataset.cache_limit: {data.cache_limit!r} with no remote would delete the only copy of the data; '
                   'remove cache_limit, or set data_remote to where the data lies')
    if loader.num_workers == 0:
        for key in ('prefetch_factor', 'persistent_workers', 'timeout'):
            if value := getattr(loader, key):
                out.append(f'{name}.{key}: {value!r} needs worker processes; set {name}.num_workers above 0, or remove it')
    return out


def _place(data: DatasetConfig) -> str:
    """Where a split is read from, in one spelling."""
    path = os.path.join(data.remote or data.local, data.split)
    return path if '://' in path else os.path.realpath(path)


def _split_errors(c: Config) -> list[str]:
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
    train, evals = c.train_loader.dataset, c.eval_loader.dataset
    if evals.group_method == 'concat':
        out.append("eval_loader.dataset.group_method: 'concat' has no fixed set of samples to evaluate; "
                   'set truncate, or evaluate on packed tokens')
    if _place(train) == _place(evals) and not c.allow_same_split:
        out.append(f'eval_loader.dataset.split: {evals.split!r} is also what train_loader reads, so the evaluation would be '
                   'of the training data; change one, or set allow_same_split=true if that is what you want')
    return out


def _unit_errors(c: Config) -> list[str]:
    out = []
    times = (c.max_duration, c.scheduler.t_warmup, c.scheduler.t_max)
    duration, warmup, t_max = ((float(m[1]), m[2]) for m in map(TIME.match, times) if m)
    packed = c.train_loader.dataset.group_method == 'concat'
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
        if warmup[1] == 'dur' and warmup[0] >= 1:
            out.append(f'scheduler.t_warmup: {c.scheduler.t_warmup!r} must be shorter than the run, 1dur')
        if t_max[0] < {duration[1]: duration[0], 'dur': 1.0}.get(t_max[1], 0.0):
            out.append(f'scheduler.t_max: {c.scheduler.t_max!r} must be at least max_duration {c.max_duration!r}, or 1dur')
    for key in ('max_duration', 'eval_interval', 'save_interval'):
        amount = TIME.match(getattr(c, key))
        if amount and not float(amount[1]):
            out.append(f'{key}: {getattr(c, key)!r} must be greater than 0')
    if len(c.optimizer.betas) != 2 or not all(0 <= b < 1 for b in c.optimizer.betas):
        out.append(f'optimizer.betas: {c.optimizer.betas} must be two numbers from 0 up to, not including, 1')
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
    if c.precision == 'amp_fp8' and importlib.util.find_spec('transformer_engine') is None:
        out.append("precision: 'amp_fp8' needs the package transformer-engine, which is not installed; set amp_bf16")
    if c.autoresume and (c.save_folder is None or run_name(c) is None):
        out.append('autoresume: true needs save_folder and run_name, so that a later start finds the checkpoints')
    if c.fsdp_config and c.fsdp_config.sharding_strategy == 'HYBRID_SHARD' and (
            (c.fsdp_config.data_parallel_replicate_degree or 1) < 2):
        out.append("fsdp_config.sharding_strategy: 'HYBRID_SHARD' needs data_parallel_replicate_degree, the number of copies of "
                   'the model, above 1; without it Composer shards fully')
    if c.load_weights_only and c.load_path is None:
        out.append('load_weights_only: true does nothing without load_path')
    return out


def run_name(c: Config) -> Optional[str]:
    """The run's name as Composer will find it; None: it makes one up."""
    return c.run_name or os.environ.get('COMPOSER_RUN_NAME') or os.environ.get('RUN_NAME')


def check_checkpoints(c: Config) -> None:
    """Refuses to load from nothing, to save where nothing can be written, and to start a new run among another's checkpoints."""
    if c.load_path and '://' not in c.load_path and not Path(c.load_path.replace('{rank}', '0')).is_file():
        raise UserError(f'load_path: {c.load_path}: no such file')
    if c.save_folder is None or '://' in c.save_folder:
        return
    name = run_name(c)
    folder = Path(c.save_folder.replace('{run_name}', name) if name else c.save_folder.split('{')[0])
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f'save_folder: {folder} cannot be made or written: {existing} is no folder that may be written')
    whole_name = name or '{run_name}' not in c.save_folder
    if whole_name and not (c.autoresume or c.load_path) and any(folder.glob('ep*')):
        raise UserError(f'save_folder: {folder} already holds checkpoints. To go on from them set autoresume=true; '
                        'to start afresh set another run_name or save_folder, or move them away')


def check_seq_len(c: Config, max_positions: Optional[int]) -> None:
    """Refuses sequences that the model has no positions for; a Hugging Face model's limit is known once it is built."""
    for name, loader in (('train_loader', c.train_loader), ('eval_loader', c.eval_loader)):
        if loader and max_positions and loader.dataset.max_seq_len > max_positions:
            raise UserError(f'{name}.dataset.max_seq_len: {loader.dataset.max_seq_len} is above the {max_positions} '
                            'positions of the model; set a smaller max_seq_len, or more positions in model.config_overrides')

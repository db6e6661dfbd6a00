"""YAML and command line to one checked config.

`load` merges the two with OmegaConf; `check` holds the result against `src/schema.py` and reports every
mistake at once, before anything is built.
"""

import difflib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from src.batch_size import device_batch_size
from src.errors import UserError
from src.schema import (
    MODEL_CONFIGS,
    TIME,
    Config,
    DatasetConfig,
    FSDPConfig,
    HFCausalLMConfig,
    LoaderConfig,
    MosaicGPTConfig,
    OptimizerConfig,
    SchedulerConfig,
    Section,
    TokenizerConfig,
)

# ---------------------------------------------------------------- loading


def load(argv: list[str]) -> DictConfig:
    """Merges `YAML [key=value ...]`; later wins.

    Args:
        argv: The command line without the program's name.

    Raises:
        UserError: No YAML, a file that is missing or does not parse, an override that is not `key=value`.
    """
    if not argv or argv[0].startswith('-') or '=' in argv[0]:
        raise UserError(f'the first argument must be a YAML file, not {argv[0] if argv else "nothing"!r}.\n'
                        '  usage: composer main.py yamls/quickstart.yaml [key=value ...]')
    path = Path(argv[0])
    if not path.is_file():
        near = difflib.get_close_matches(argv[0], [str(p) for p in path.parent.glob('*.yaml')], n=1)
        raise UserError(f'{argv[0]}: no such file.' + (f' Did you mean {near[0]}?' if near else ''))
    for arg in argv[1:]:
        if '=' not in arg or arg.startswith(('-', '=')):
            raise UserError(f'override {arg!r} is not of the form key=value, as in max_duration=100ba or optimizer.lr=3e-4')
    try:
        base = OmegaConf.load(path)
        if not isinstance(base, DictConfig):
            raise UserError(f'{argv[0]}: must be a mapping of settings, but holds a {type(base).__name__}')
        merged = OmegaConf.merge(base, OmegaConf.from_dotlist(argv[1:]))
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as e:
        raise UserError(f'{argv[0]}: cannot be read as YAML with overrides {argv[1:]}: {e}') from None
    assert isinstance(merged, DictConfig)
    return merged


def plain(cfg: Any) -> dict[str, Any]:
    """Any config (OmegaConf, pydantic or mapping) as plain containers, interpolations resolved.

    Raises:
        UserError: An interpolation `${...}` that points nowhere.
    """
    if isinstance(cfg, BaseModel):
        return cfg.model_dump()
    try:
        container = OmegaConf.to_container(cfg if isinstance(cfg, DictConfig) else OmegaConf.create(dict(cfg)),
                                           resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as e:
        raise UserError(f'config: {str(e).splitlines()[0]} (key: {e.full_key or "?"})') from None
    assert isinstance(container, dict)
    return {str(k): v for k, v in container.items()}


SectionT = TypeVar('SectionT', bound=Section)


def parse(schema: type[SectionT], cfg: Any) -> SectionT:
    """One section, checked: what a model or loader calls on the config that it is given.

    Raises:
        UserError: Names every key that is unknown, missing or of a wrong type.
    """
    if isinstance(cfg, schema):
        return cfg
    try:
        return schema.model_validate(plain(cfg))
    except ValidationError as e:
        raise _report([_explain(err, schema) for err in e.errors()]) from None


# ---------------------------------------------------------------- checking


def check(cfg: Any, registries: Mapping[str, Mapping[str, Any]], world_size: int, has_gpu: bool) -> Config:
    """Holds a whole config against the schema and against the machine.

    Args:
        cfg: What `load` returned, or any mapping.
        registries: For each of `callbacks`, `loggers` and `algorithms`: name to class. The keywords in the YAML
            are held against the class's signature.
        world_size: Number of devices over all nodes.
        has_gpu: Whether the run uses GPUs.

    Raises:
        UserError: Lists every mistake.
    """
    raw = plain(cfg)
    errors: list[str] = []
    config: Optional[Config] = None
    try:
        config = Config.model_validate(raw)
    except ValidationError as e:
        errors += [_explain(err, Config) for err in e.errors()]
    for section, classes in registries.items():
        chosen = raw.get(section) or {}
        if isinstance(chosen, dict):
            for name, kwargs in chosen.items():
                errors += _plugin_errors(section, str(name), kwargs or {}, classes)
    if config is not None:
        errors += _combination_errors(config, world_size, has_gpu)
    if errors:
        raise _report(errors)
    assert config is not None
    return config


def _report(errors: list[str]) -> UserError:
    head = '1 mistake in the config:' if len(errors) == 1 else f'{len(errors)} mistakes in the config:'
    return UserError('\n'.join([head] + [f'  - {e}' for e in errors]))


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f'did you mean {near[0]!r}?' if near else f'known: {", ".join(sorted(known))}'


def _fields_at(schema: type[BaseModel], loc: tuple) -> list[str]:
    """The keys that the schema has at a location that pydantic reports."""
    classes = {**MODEL_CONFIGS, 'model': MosaicGPTConfig, 'dataset': DatasetConfig, 'train_loader': LoaderConfig,
               'eval_loader': LoaderConfig, 'optimizer': OptimizerConfig, 'scheduler': SchedulerConfig,
               'tokenizer': TokenizerConfig, 'fsdp_config': FSDPConfig}
    found = next((classes[part] for part in reversed(loc) if part in classes), schema)
    return list(found.model_fields)


_TYPES = {'int_type': 'a whole number', 'float_type': 'a number', 'bool_type': 'true or false', 'string_type': 'text',
          'model_type': 'a section with keys of its own', 'dict_type': 'a section with keys of its own',
          'list_type': 'a list'}


def _explain(err: Any, schema: type[BaseModel]) -> str:
    """One of pydantic's errors in the kit's words."""
    loc = err['loc']
    # A union adds the tag or type that it tried to the location: it is no key of the YAML.
    tags = {*MODEL_CONFIGS, 'int', 'str'}
    key = '.'.join(str(p) for p in loc if p not in tags and not str(p).startswith(('literal[', 'constrained-')))
    value, kind, ctx = err['input'], err['type'], err.get('ctx', {})
    if kind == 'extra_forbidden':
        return f'{key}: no such key; {_nearest(str(loc[-1]), _fields_at(schema, loc[:-1]))}'
    if kind == 'missing':
        return f'{key}: missing; it has no default'
    if kind == 'literal_error':
        return f'{key}: {value!r} is not one of {ctx["expected"]}'
    if kind.startswith('union_tag'):
        name = value.get('name') if isinstance(value, dict) else value
        return f'{key}.name: {name!r} is not one of {", ".join(map(repr, MODEL_CONFIGS))}'
    if kind == 'string_pattern_mismatch':
        return f'{key}: {value!r} is not a time: a number with a unit, as in 100ba (batches), 1ep (epochs), 2000000tok or 1dur'
    if kind in _TYPES:
        return f'{key}: {value!r} must be {_TYPES[kind]}'
    bounds = {'greater_than': 'gt', 'greater_than_equal': 'ge', 'less_than': 'lt', 'less_than_equal': 'le'}
    if kind in bounds:
        return f'{key}: {value!r} must be {kind.replace("_", " ")} {ctx[bounds[kind]]}'
    return f'{key}: {value!r}: {err["msg"]}'


def _plugin_errors(section: str, name: str, kwargs: Any, classes: Mapping[str, Any]) -> list[str]:
    """Mistakes in one entry of `callbacks`, `loggers` or `algorithms`."""
    if name not in classes:
        return [f'{section}.{name}: no such name; {_nearest(name, list(classes))}']
    if not isinstance(kwargs, dict):
        return [f'{section}.{name}: {kwargs!r} must be a section with keys of its own, or {{}}']
    parameters = inspect.signature(classes[name]).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return []
    return [f'{section}.{name}.{key}: no such key; {_nearest(key, list(parameters))}' for key in kwargs if key not in parameters]


def _combination_errors(c: Config, world_size: int, has_gpu: bool) -> list[str]:
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
    if data.cache_limit is not None and data.remote in (None, data.local):
        out.append(f'{name}.dataset.cache_limit: {data.cache_limit!r} with no remote would delete the only copy of the data; '
                   'remove cache_limit, or set data_remote to where the data lies')
    if loader.num_workers == 0:
        for key in ('prefetch_factor', 'persistent_workers', 'timeout'):
            if value := getattr(loader, key):
                out.append(f'{name}.{key}: {value!r} needs worker processes; set {name}.num_workers above 0, or remove it')
    return out


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
    train, evals = c.train_loader.dataset, c.eval_loader.dataset
    if evals.group_method == 'concat':
        out.append("eval_loader.dataset.group_method: 'concat' has no fixed set of samples to evaluate; "
                   'set truncate, or evaluate on packed tokens')
    if (train.remote or train.local, train.split) == (evals.remote or evals.local, evals.split) and not c.allow_same_split:
        out.append(f'eval_loader.dataset.split: {evals.split!r} is also what train_loader reads, so the evaluation would be '
                   'of the training data; change one, or set allow_same_split=true if that is what you want')
    return out


def _unit_errors(c: Config) -> list[str]:
    out = []
    duration, warmup = TIME.match(c.max_duration), TIME.match(c.scheduler.t_warmup)
    assert duration and warmup
    epochs_have_a_length = c.train_loader.dataset.group_method != 'concat'
    if duration[2] == 'ep' and not epochs_have_a_length:
        out.append(f"max_duration: {c.max_duration!r}: with group_method 'concat' an epoch has no length to schedule by; "
                   'give batches (ba) or tokens (tok)')
    elif warmup[2] not in ('dur', duration[2]) and {warmup[2], duration[2]} != {'ba', 'ep'}:
        out.append(f'scheduler.t_warmup: {c.scheduler.t_warmup!r} and max_duration {c.max_duration!r} must have one unit; '
                   f'give t_warmup in {duration[2]}, or as a fraction such as 0.02dur')
    for key in ('max_duration', 'save_interval'):
        amount = TIME.match(getattr(c, key))
        if amount and not float(amount[1]):
            out.append(f'{key}: {getattr(c, key)!r} must be greater than 0')
    if duration[2] == 'dur':
        out.append(f'max_duration: {c.max_duration!r} is a fraction of itself; use ba, tok, sp or ep')
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
    if c.autoresume and (c.save_folder is None or c.run_name is None):
        out.append('autoresume: true needs save_folder and run_name, so that a later start finds the checkpoints')
    if c.load_weights_only and c.load_path is None:
        out.append('load_weights_only: true does nothing without load_path')
    return out


# ---------------------------------------------------------------- printing

SECRET = re.compile(r'(^|_)(api_?key|key|token|password|passwd|secret|credential|credentials|auth)$', re.IGNORECASE)


def masked(value: Any, key: str = '') -> Any:
    """A copy for people and loggers: keys, tokens and passwords replaced, also inside URLs."""
    if isinstance(value, Mapping):
        return {k: masked(v, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(v) for v in value]
    if isinstance(value, str):
        if SECRET.search(key):
            return '***'
        return re.sub(r'(\w+://)[^/@\s]+@', r'\1***@', value)
    return value

"""YAML and command line to one checked config.

`load` merges the two with OmegaConf; `check` holds the result against `src/config/schema.py` and reports every
mistake at once, before anything is built.
"""

import copy
import difflib
import inspect
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Optional, TypeVar, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from src.common.errors import UserError, masked
from src.config.checks import combination_errors
from src.config.old_keys import translate, what_to_write
from src.config.overrides import NOT_OF_ITS_TAG, override
from src.config.schema import (
    MODEL_CONFIGS,
    TIME,
    CompileConfig,
    Config,
    DatasetConfig,
    FSDPConfig,
    LoaderConfig,
    MosaicGPTConfig,
    OptimizerConfig,
    SchedulerConfig,
    Section,
    StreamConfig,
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
    if not os.path.isfile(path):
        near = difflib.get_close_matches(argv[0], [str(p) for p in path.parent.glob('*.yaml')], n=1)
        what = 'a folder, not a YAML file.' if os.path.isdir(path) else 'no such file.'
        raise UserError(f'{argv[0]}: {what}' + (f' Did you mean {near[0]}?' if near else ''))
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as e:
        raise UserError(f'{argv[0]}: cannot be read as YAML: {e}') from None
    except NOT_OF_ITS_TAG as e:  # which quotes the value
        raise UserError(f'{argv[0]}: cannot be read as YAML: a value is not of the tag before it: {type(e).__name__}') from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f'{argv[0]}: must be a mapping of settings, but holds a {type(loaded).__name__}')
    merged, given = loaded, OmegaConf.create({})
    for arg in argv[1:]:
        merged, given = override(merged, arg), override(given, arg)
    return translate(merged, loaded, given)


def plain(cfg: Any) -> dict[str, Any]:
    """Any config (OmegaConf, pydantic or mapping) as plain containers, interpolations and home folders (`~/`) resolved.

    Raises:
        UserError: An interpolation `${...}` that points nowhere.
    """
    if isinstance(cfg, BaseModel):
        return cfg.model_dump()
    cfg = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(dict(cfg))
    try:
        container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as e:
        raise UserError(_unresolved(str(e).splitlines()[0], e.full_key, cfg)) from None
    assert isinstance(container, dict)
    return {str(k): v for k, v in _at_home(container).items()}


def shown(c: Config) -> str:
    """A config as YAML, with its defaults; secrets are masked."""
    return yaml.safe_dump(masked(plain(c)), sort_keys=False, width=120, allow_unicode=True)


def _unresolved(said: str, key: Any, cfg: DictConfig) -> str:
    """What to say of an interpolation that OmegaConf does not resolve."""
    if refers := re.search(r"(?:trying to access |Interpolation key ')(\w+)(\.?)", said):
        top, raw = refers[1], OmegaConf.to_container(cfg)
        value = raw.get(top) if isinstance(raw, dict) else None
        if not refers[2]:
            said += f'; for a variable of the shell write ${{oc.env:{top}}}'
        elif not isinstance(value, dict) or not value:
            return f'{top}: {masked(value, top)!r} must be a section with keys of its own; {key} refers to one'
    return f'config: {said} (key: {key or "?"})'


def _at_home(value: Any) -> Any:
    """A copy in which each text that begins with `~/` or `~name/` begins with that user's home folder, as in a shell."""
    if isinstance(value, dict):
        return {key: _at_home(child) for key, child in value.items()}
    return os.path.expanduser(value) if isinstance(value, str) and re.match(r'~[\w.-]*/', value) else value


def flat(cfg: Any) -> dict[str, Any]:
    """Dotted key to value, secrets masked, without what may differ between nodes: where each copies its shards to."""
    def walk(prefix: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or not value:
            return {prefix: value}
        return {k: v for key, child in value.items() for k, v in walk(f'{prefix}.{key}' if prefix else str(key), child).items()}
    return {k: v for k, v in walk('', masked(plain(cfg))).items() if k.split('.')[-1] not in ('local', 'data_local')}


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


def check(cfg: Any, registries: Mapping[str, Mapping[str, Any]], world_size: int, has_gpu: bool,
          num_nodes: int = 1, kits_loader: bool = True) -> Config:
    """Holds a whole config against the schema and against the machine.

    Args:
        cfg: What `load` returned, or any mapping.
        registries: For each of `callbacks`, `loggers` and `algorithms`: name to class. The keywords in the YAML
            are held against the class's signature.
        world_size: Number of devices over all nodes.
        has_gpu: Whether the run uses GPUs.
        num_nodes: Number of nodes.
        kits_loader: Whether the kit's own loader reads what sections `dataset` name.

    Raises:
        UserError: Lists every mistake.
    """
    raw = plain(cfg)
    raw |= {section: _without_nulls(raw[section], classes) for section, classes in registries.items() if section in raw}
    errors: list[str] = []
    config: Optional[Config] = None
    try:
        config = Config.model_validate(raw)
    except ValidationError as e:
        problems = [err for err in e.errors() if not (err['loc'][0] in registries and len(err['loc']) > 1)]
        errors += list(dict.fromkeys(_explain(err, Config) for err in problems))
        config = _without(raw, [err['loc'] for err in e.errors()])
    for section, classes in registries.items():
        chosen = raw.get(section) or {}
        if isinstance(chosen, dict):
            for name, kwargs in chosen.items():
                errors += _plugin_errors(section, str(name), kwargs, classes)
    if config is not None:
        errors += combination_errors(config, world_size, has_gpu, num_nodes, kits_loader)
    if errors:
        raise _report(errors)
    assert config is not None
    return config


def _without(raw: dict[str, Any], bad: list[tuple]) -> Optional[Config]:
    """The config without the keys at `bad`, so that the others can still be held against each other; None if it needs them."""
    rest = copy.deepcopy(raw)
    for loc in bad:
        keys = [part for part in loc if part not in MODEL_CONFIGS]
        parent: Any = rest
        while len(keys) > 1 and isinstance(parent, dict) and isinstance(parent.get(keys[0]), dict):
            parent = parent[keys.pop(0)]
        if isinstance(parent, dict):
            parent.pop(keys[0], None)
    try:
        return Config.model_validate(rest)
    except ValidationError:
        return None


def _report(errors: list[str]) -> UserError:
    head = '1 mistake in the config:' if len(errors) == 1 else f'{len(errors)} mistakes in the config:'
    return UserError('\n'.join([head] + [f'  - {e}' for e in errors]))


def _nearest(word: str, known: list[str]) -> str:
    """A key that is spelled nearly so, or those that have the word as a part; else all of them."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    near = near or [key for key in known if f'_{word}_' in f'_{key}_']
    return f'did you mean {" or ".join(map(repr, near))}?' if near else f'known: {", ".join(sorted(known))}'


def _fields_at(schema: type[BaseModel], loc: tuple) -> list[str]:
    """The keys that the schema has at a location that pydantic reports."""
    classes = {**MODEL_CONFIGS, 'model': MosaicGPTConfig, 'dataset': DatasetConfig, 'train_loader': LoaderConfig,
               'eval_loader': LoaderConfig, 'optimizer': OptimizerConfig, 'scheduler': SchedulerConfig,
               'tokenizer': TokenizerConfig, 'fsdp_config': FSDPConfig, 'compile_config': CompileConfig, 'streams': StreamConfig}
    found = next((classes[part] for part in reversed(loc) if part in classes), schema)
    return list(found.model_fields)


_TYPES = {'int_type': 'a whole number', 'float_type': 'a number', 'bool_type': 'true or false', 'string_type': 'text',
          'finite_number': 'a finite number', 'model_type': 'a section with keys of its own',
          'dict_type': 'a section with keys of its own',
          'list_type': 'a list', 'model_attributes_type': 'a section with keys of its own'}


def _explain(err: Any, schema: type[BaseModel]) -> str:
    """One of pydantic's errors in the kit's words."""
    loc = err['loc']
    # A union adds the tag or type that it tried to the location: it is no key of the YAML.
    tags = {*MODEL_CONFIGS, 'int', 'str'}
    key = '.'.join(str(p) for p in loc if p not in tags and not str(p).startswith(('literal[', 'constrained-')))
    value, kind, ctx = masked(err['input'], key.split('.')[-1]), err['type'], err.get('ctx', {})
    if kind == 'extra_forbidden':
        return f'{key}: no such key; {what_to_write(key) or _nearest(str(loc[-1]), _fields_at(schema, loc[:-1]))}'
    if kind == 'missing':
        return f'{key}: missing; it has no default'
    if kind == 'string_too_short':
        return f'{key}: is empty, as is a variable of the shell that is not set; write a value, or {key}=null for none'
    if kind == 'literal_error':
        return f'{key}: {value!r} is not one of {ctx["expected"]}'
    if kind.startswith('union_tag'):
        name = value.get('name') if isinstance(value, dict) else value
        return f'{key}.name: {name!r} is not one of {", ".join(map(repr, MODEL_CONFIGS))}'
    if kind in ('string_pattern_mismatch', 'string_type') and key == 'console_log_interval':
        return f'{key}: {value!r} must be a number of batches or epochs above 0, as in 10ba or 1ep'
    if kind == 'string_pattern_mismatch' or kind == 'string_type' and key in TIMES:
        return (f'{key}: {value!r} is not a time: a whole number with a unit, as in 100ba (batches), 1ep (epochs), 5000sp '
                '(samples), 2000000tok (tokens), or a fraction of the duration, as in 0.1dur')
    if kind in _TYPES:
        return f'{key}: {value!r} must be {_TYPES[kind]}' + _quotes(key, value) * (kind == 'string_type')
    bounds = {'greater_than': ('gt', 'greater than'), 'greater_than_equal': ('ge', 'at least'), 'less_than': ('lt', 'less than'),
              'less_than_equal': ('le', 'at most')}
    if kind in bounds:
        bound = ctx[bounds[kind][0]]
        return f'{key}: {value!r} must be {bounds[kind][1]} {int(bound) if bound == int(bound) else bound}'
    return f'{key}: {value!r}: {err["msg"]}'


# By their dotted keys: the settings that are times
TIMES = {prefix + name for prefix, cls in (('', Config), ('scheduler.', SchedulerConfig)) for name, field in
         cls.model_fields.items() if any(getattr(rule, 'pattern', None) == TIME.pattern for rule in field.metadata)}


def _quotes(key: str, value: Any) -> str:
    """How to write a value that YAML takes for a number."""
    if isinstance(value, bool):
        return '; write null for none'
    if not isinstance(value, (int, float)):
        return ''
    return f""": put it in quotes, {key.split('.')[-1]}: '{value}' in a YAML, {key}="'{value}'" in a shell"""


def _without_nulls(chosen: Any, classes: Mapping[str, Any]) -> Any:
    """One of the sections `callbacks`, `loggers` and `algorithms` without keywords that are null: they have their defaults."""
    if not isinstance(chosen, dict):
        return chosen
    out = {}
    for name, kwargs in chosen.items():
        parameters = inspect.signature(classes[name]).parameters if isinstance(kwargs, dict) and name in classes else {}
        hints = _hints(classes[name]) if parameters else {}
        out[name] = {key: value for key, value in kwargs.items() if value is not None or key not in parameters
                     or parameters[key].default in (None, inspect.Parameter.empty)
                     or NoneType in get_args(hints.get(key))} if parameters else kwargs
    return out


def _hints(cls: Any) -> dict[str, Any]:
    """The types of a class's keywords; empty where its module imports one for type checkers alone."""
    try:
        return get_type_hints(cls.__init__)
    except NameError:
        return {}


def _plugin_errors(section: str, name: str, kwargs: Any, classes: Mapping[str, Any]) -> list[str]:
    """Mistakes in one entry of `callbacks`, `loggers` or `algorithms`: its name, keywords, and their types."""
    if name not in classes:
        return [f'{section}.{name}: no such name; {_nearest(name, list(classes))}']
    if kwargs is False:
        return []
    if not isinstance(kwargs, dict) and kwargs is not None:
        return [f'{section}.{name}: must be a section with keys of its own, {{}} for none, or false to switch it off']
    kwargs = kwargs or {}
    parameters = inspect.signature(classes[name]).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return []
    out = [f'{section}.{name}.{key}: no such key; {_nearest(key, list(parameters))}' for key in kwargs if key not in parameters]
    out += [f'{section}.{name}.{key}: missing; it has no default' for key, p in parameters.items()
            if p.default is p.empty and key not in kwargs]
    hints = _hints(classes[name])
    for key, value in kwargs.items():
        if key in hints:
            try:
                strict = ConfigDict(arbitrary_types_allowed=True, strict=True)
                TypeAdapter(hints[key], config=strict).validate_python(value)
            except ValidationError as e:
                wanted = ' or '.join(dict.fromkeys(_TYPES.get(err['type'], err['msg']) for err in e.errors()))
                if isinstance((*e.errors()[0]['loc'], '')[0], int):
                    wanted = f'a list, each item {wanted}'
                quotes = _quotes(f'{section}.{name}.{key}', masked(value, key)) * (wanted == _TYPES['string_type'])
                out.append(f'{section}.{name}.{key}: {masked(value, key)!r} must be {wanted}{quotes}')
            except PydanticSchemaGenerationError:  # a type that only Python can check
                continue
        is_composers = classes[name].__init__.__module__.startswith('composer.')  # a class of a fork has limits of its own
        allowed, holds = (LIMITS | COMPOSERS_LIMITS if is_composers else LIMITS).get(key, ('', lambda value: True))
        if isinstance(value, float) and math.isnan(value):
            out.append(f'{section}.{name}.{key}: {value!r} must be a number')
        elif isinstance(value, (int, float, str)) and not holds(value):
            out.append(f'{section}.{name}.{key}: {value!r} must be {allowed}')
    return out


# Composer finds out in mid-run, or never
_ABOVE_0 = 'greater than 0', lambda value: isinstance(value, str) or value > 0
LIMITS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    'window_size': _ABOVE_0, 'flush_interval': _ABOVE_0, 'buffer_size': _ABOVE_0, 'clipping_threshold': _ABOVE_0}
COMPOSERS_LIMITS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    'batch_log_interval': _ABOVE_0, 'dist_aggregate_batch_interval': _ABOVE_0,
    'skip_batches': ('at least 0', lambda value: isinstance(value, str) or value >= 0),
    'clipping_type': ("'norm', 'value' or 'adaptive'", lambda value: value in ('norm', 'value', 'adaptive'))}

"""Checks a config, or one section of it, against `src/config/schema.py`, and reports all mistakes at once."""

import copy
import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Optional, TypeVar

from pydantic import BaseModel, ValidationError

from src.common.errors import UserError, mask_secrets
from src.config.data_checks import data_errors, packs_on_the_fly
from src.config.load import to_plain
from src.config.model_checks import model_errors
from src.config.old_keys import advice_for_old_key, fill_shared_values
from src.config.plugin_entries import find_class, keywords_of
from src.config.run_checks import machine_errors, schedule_errors
from src.config.schema import MODEL_CONFIGS, Config, Section, types_below

SectionT = TypeVar('SectionT', bound=Section)


def parse(schema: type[SectionT], cfg: Any) -> SectionT:
    """Checks one section and returns it typed. Models and loaders call this on their config.

    Raises UserError, which names every key that is unknown, missing or of a wrong type.
    """
    if isinstance(cfg, schema):
        return cfg
    raw = to_plain(cfg)
    try:
        return schema.model_validate(raw)
    except ValidationError as e:
        raise _report(_explain(e, schema, raw)) from None


def check(cfg: Any, registries: Mapping[str, Mapping[str, Any]], world_size: int, has_gpu: bool,
          num_nodes: int = 1, uses_kit_loader: bool = True) -> Config:
    """Checks a whole config, from `load` or any mapping, against the schema and the machine, and returns it typed.

    `registries` has a dictionary of names and classes for each of `callbacks`, `loggers` and `algorithms`; the keys in
    the YAML must be arguments of the class. `world_size` counts the devices over all nodes. `uses_kit_loader` is False
    where a loader of the user's own reads the data. Raises UserError, which lists every mistake.
    """
    config, errors = _validate(cfg, registries)
    if config is not None:
        packed = uses_kit_loader and packs_on_the_fly(config.train_loader.dataset)
        errors += _contradictions(config, world_size, has_gpu, num_nodes, uses_kit_loader, packed)
    if errors:
        raise _report(errors)
    assert config is not None
    return config


def check_without_torch(cfg: Any, registries: Mapping[str, Mapping[str, Any]], world_size: int, num_nodes: int = 1,
                        gpu: Collection[bool] = (False, True)) -> None:
    """Finds, in a fraction of a second, the mistakes of a config that need neither torch nor Composer.

    `check` finds them too, and those in the keywords of plugins, in `compile_config` and in the folders of the kit's
    loader. `gpu` has the answers that are possible to the question whether the run has GPUs: a mistake counts if it is
    one for all of them. Raises UserError, which lists the mistakes as `check` does.
    """
    config, errors = _validate(cfg, {section: dict.fromkeys(names) for section, names in registries.items()})
    if config is not None:
        config = config.model_copy(update={'compile_config': None})
        first, *others = ([*_contradictions(config, world_size, has_gpu, num_nodes, False, packed)]
                          for has_gpu in gpu for packed in (False, True))
        errors += [error for error in first if all(error in other for other in others)]
    if errors:
        raise _report(errors)


def _validate(cfg: Any, registries: Mapping[str, Mapping[str, Any]]) -> tuple[Optional[Config], list[str]]:
    """The config without the keys that are wrong (None where a wrong key is required), and a line for each of them."""
    raw, errors = to_plain(fill_shared_values(cfg)), []
    for section, classes in registries.items():
        if isinstance(raw.get(section), dict):
            raw[section], mistakes = _check_plugins(section, raw[section], classes)
            errors += mistakes
    try:
        return Config.model_validate(raw), errors
    except ValidationError as e:
        return _config_without_mistakes(raw, e), errors + _explain(e, Config, raw)


def _contradictions(c: Config, world_size: int, has_gpu: bool, num_nodes: int, uses_kit_loader: bool,
                    packed: bool) -> Iterator[str]:
    """A line for each setting that does not go with another one or with the machine."""
    yield from model_errors(c, has_gpu)
    yield from data_errors(c, num_nodes, uses_kit_loader)
    yield from schedule_errors(c, packed)
    yield from machine_errors(c, world_size, has_gpu)


def _check_plugins(section: str, chosen: Mapping[str, Any],
                   classes: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The valid entries of `callbacks`, `loggers` or `algorithms`, and a line for each mistake in the others.

    Where the class of a name is None, its keywords are not checked.
    """
    valid, errors = {}, []
    for name, kwargs in chosen.items():
        key = f'{section}.{name}'
        if name not in classes:
            errors.append(f'{key}: no such name; {_nearest(str(name), list(classes))}')
        elif kwargs is not None and kwargs is not False and not isinstance(kwargs, dict):
            errors.append(f'{key}: must be a section with keys, {{}} for its defaults, or false to switch it off')
        elif kwargs is False or classes[name] is None:
            valid[name] = kwargs
        else:
            schema = keywords_of(find_class(classes[name]))
            try:
                keys_set = schema.model_validate(kwargs or {}).model_fields_set
                valid[name] = kwargs and {key: value for key, value in kwargs.items() if key in keys_set}
            except ValidationError as e:
                errors += _explain(e, schema, kwargs or {}, f'{key}.')
    return valid, errors


def _config_without_mistakes(raw: dict[str, Any], error: ValidationError) -> Optional[Config]:
    """The config without the keys that are wrong, to check the others together; None where a wrong key is required."""
    rest = copy.deepcopy(raw)
    for err in error.errors():
        keys, parent = _path(err, raw), rest
        while len(keys) > 1 and isinstance(parent.get(keys[0]), dict):
            parent = parent[keys.pop(0)]
        parent.pop(keys[0], None)
    try:
        return Config.model_validate(rest)
    except ValidationError:
        return None


# ---------------------------------------------------------------- messages
def _report(errors: list[str]) -> UserError:
    head = '1 mistake in the config:' if len(errors) == 1 else f'{len(errors)} mistakes in the config:'
    return UserError('\n'.join([head] + [f'  - {e}' for e in errors]))


def _explain(error: ValidationError, schema: type[BaseModel], raw: Any, prefix: str = '') -> list[str]:
    """Turns pydantic's errors into messages with the keys of the YAML, one line for each key.

    `raw`, a section or the whole config, was checked against `schema`. `prefix` is the dotted key of that section.
    """
    messages: dict[str, list[str]] = {}
    for err in error.errors():
        key = prefix + '.'.join(map(str, _path(err, raw)))
        messages.setdefault(key, []).append(_message(err, key, schema))
    # pydantic reports one error for each type that a value may have: join them to "must be A or B"
    joined = {key: [first, *(line.rpartition(' must be ')[2] for line in more)]
              for key, (first, *more) in messages.items()}
    return [f'{key}: {" or ".join(dict.fromkeys(lines))}' for key, lines in joined.items()]


def _path(err: Any, raw: Any) -> list[Any]:
    """The keys that lead to an error in the config; pydantic's location also holds names of types, for a union."""
    path, value = [], raw
    for part in err['loc']:
        if isinstance(value, dict) and part in value or isinstance(value, list) and isinstance(part, int):
            path.append(part)
            value = value[part]
    is_absent = err['type'] == 'missing' and path[-1:] != [err['loc'][-1]]  # a null is in `path` already
    return [*path, err['loc'][-1]] if is_absent else path


YAML_WORDS = {'None': 'null', 'True': 'true', 'False': 'false'}
_TYPES = {'int_type': 'a whole number', 'float_type': 'a number', 'bool_type': 'true or false', 'string_type': 'text',
          'list_type': 'a list', **dict.fromkeys(('dict_type', 'model_type', 'model_attributes_type'),
                                                 'a section with keys of its own')}


def _message(err: Any, key: str, schema: type[BaseModel]) -> str:
    """Describes the mistake in the value of `key` and what to write instead; the caller adds the key."""
    name, kind = key.split('.')[-1], err['type']
    value = mask_secrets(err['input'], name)
    if kind == 'extra_forbidden':
        return f'no such key; {advice_for_old_key(key) or _nearest(name, _fields_at(schema, err["loc"][:-1]))}'
    if kind == 'missing':
        return 'missing; it has no default'
    if kind == 'string_too_short':
        return f'is empty; write a value, or {key}=null for none. A shell variable that is not set gives an empty value'
    if kind.startswith('union_tag'):
        tag = value.get('name') if isinstance(value, dict) else value
        return f'name must be {" or ".join(map(repr, MODEL_CONFIGS))}, not {_as_yaml(tag)}'
    if kind in _TYPES:
        return f'{_as_yaml(value)} must be {_TYPES[kind]}' + (_quotes(key, value) if kind == 'string_type' else '')
    text = re.sub(r'\b(None|True|False)$', lambda m: YAML_WORDS[m[0]], err['msg'].replace('Input should be', 'must be'))
    return f'{_as_yaml(value)} {text}' if text.startswith('must be') else f'{_as_yaml(value)}: {text}'


def _as_yaml(value: Any) -> str:
    return YAML_WORDS.get(repr(value), repr(value))


def _quotes(key: str, value: Any) -> str:
    """How to write text that YAML reads as a number."""
    if isinstance(value, bool):
        return '; write null for none'
    if not isinstance(value, (int, float)):
        return ''
    return f""": put it in quotes, {key.split('.')[-1]}: '{value}' in a YAML, or {key}="'{value}'" in a shell"""


def _nearest(word: str, known: list[str]) -> str:
    """Suggests the key with the nearest spelling, else those that contain the word; where there is none, lists all."""
    similar = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    similar = similar or [key for key in known if f'_{word}_' in f'_{key}_']
    return f'did you mean {" or ".join(map(repr, similar))}?' if similar else f'known: {", ".join(sorted(known))}'


def _fields_at(schema: Any, loc: tuple) -> list[str]:
    """The keys that the schema allows at a location that pydantic reports."""
    types = [schema]
    for part in loc:
        children = [child for parent in types for child in types_below(parent, part)]
        types = [MODEL_CONFIGS[part]] if part in MODEL_CONFIGS else children or types
    return [key for cls in types if hasattr(cls, 'model_fields') for key in cls.model_fields]

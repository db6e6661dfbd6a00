"""Holds a config, or one section of it, against `src/config/schema.py`, and reports every mistake at once."""

import copy
import difflib
from collections.abc import Mapping
from typing import Any, Optional, TypeVar

from pydantic import BaseModel, ValidationError

from src.common.errors import UserError, mask_secrets
from src.config.data_checks import data_errors, packs_on_the_fly
from src.config.load import to_plain
from src.config.model_checks import model_errors
from src.config.old_keys import advice_for_old_key, fill_in
from src.config.plugin_entries import keywords_of
from src.config.run_checks import machine_errors, schedule_errors
from src.config.schema import MODEL_CONFIGS, Config, Section, types_below

SectionT = TypeVar('SectionT', bound=Section)


def parse(schema: type[SectionT], cfg: Any) -> SectionT:
    """One section, checked: what a model or loader calls on the config that it is given.

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
          num_nodes: int = 1, kits_loader: bool = True) -> Config:
    """Holds a whole config, what `load` returned or any mapping, against the schema and against the machine.

    `registries` map names to classes, for each of `callbacks`, `loggers` and `algorithms`. The keywords in the YAML are
    held against the class's signature. `world_size` counts the devices over all nodes. `kits_loader` says whether the
    kit's own loader reads what sections `dataset` name. Raises UserError, which lists every mistake.
    """
    raw, errors = to_plain(fill_in(cfg)), []
    for section, classes in registries.items():
        if isinstance(raw.get(section), dict):
            raw[section], wrong = _entries(section, raw[section], classes)
            errors += wrong
    config: Optional[Config] = None
    try:
        config = Config.model_validate(raw)
    except ValidationError as e:
        errors += _explain(e, Config, raw)
        config = _without(raw, e)
    if config is not None:
        packed = kits_loader and packs_on_the_fly(config.train_loader.dataset)
        errors += [*model_errors(config, has_gpu), *data_errors(config, num_nodes, kits_loader),
                   *schedule_errors(config, packed), *machine_errors(config, world_size, has_gpu)]
    if errors:
        raise _report(errors)
    assert config is not None
    return config


def _entries(section: str, chosen: Mapping[str, Any], classes: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The valid entries of `callbacks`, `loggers` or `algorithms`, and a line for each mistake in the others."""
    valid, errors = {}, []
    for name, kwargs in chosen.items():
        key = f'{section}.{name}'
        if name not in classes:
            errors.append(f'{key}: no such name; {_nearest(str(name), list(classes))}')
        elif kwargs is False:
            valid[name] = kwargs
        elif kwargs is not None and not isinstance(kwargs, dict):
            errors.append(f'{key}: must be a section with keys of its own, {{}} for none, or false to switch it off')
        else:
            schema = keywords_of(classes[name])
            try:
                given = schema.model_validate(kwargs or {}).model_fields_set
                valid[name] = kwargs and {key: value for key, value in kwargs.items() if key in given}
            except ValidationError as e:
                errors += _explain(e, schema, kwargs or {}, f'{key}.')
    return valid, errors


def _without(raw: dict[str, Any], wrong: ValidationError) -> Optional[Config]:
    """The config without its mistakes, so that the rest can still be held against each other; None if it needs them."""
    rest = copy.deepcopy(raw)
    for err in wrong.errors():
        keys, parent = _path(err, raw), rest
        while len(keys) > 1 and isinstance(parent.get(keys[0]), dict):
            parent = parent[keys.pop(0)]
        parent.pop(keys[0], None)
    try:
        return Config.model_validate(rest)
    except ValidationError:
        return None


# ---------------------------------------------------------------- what is said
def _report(errors: list[str]) -> UserError:
    head = '1 mistake in the config:' if len(errors) == 1 else f'{len(errors)} mistakes in the config:'
    return UserError('\n'.join([head] + [f'  - {e}' for e in errors]))


def _explain(wrong: ValidationError, schema: type[BaseModel], raw: Any, prefix: str = '') -> list[str]:
    """pydantic's errors in the words of the YAML, one line for each key.

    `raw`, a section or the whole config, was held against `schema`; `prefix` is the section's place in the config.
    """
    said: dict[str, list[str]] = {}
    for err in wrong.errors():
        key = prefix + '.'.join(map(str, _path(err, raw)))
        said.setdefault(key, []).append(_what(err, key, schema))
    # A value of several types has an error for each of them
    wanted = {key: [first, *(line.rpartition(' must be ')[2] for line in more)] for key, (first, *more) in said.items()}
    return [f'{key}: {" or ".join(dict.fromkeys(lines))}' for key, lines in wanted.items()]


def _path(err: Any, raw: Any) -> list[Any]:
    """The keys at which pydantic reports an error, without the names of types, which it adds for a union."""
    path, value = [], raw
    for part in err['loc']:
        if isinstance(value, dict) and part in value or isinstance(value, list) and isinstance(part, int):
            path.append(part)
            value = value[part]
    is_absent = err['type'] == 'missing' and path[-1:] != [err['loc'][-1]]  # a null is there, and counts as missing
    return [*path, err['loc'][-1]] if is_absent else path


_TYPES = {'int_type': 'a whole number', 'float_type': 'a number', 'bool_type': 'true or false', 'string_type': 'text',
          'list_type': 'a list', **dict.fromkeys(('dict_type', 'model_type', 'model_attributes_type'),
                                                 'a section with keys of its own')}


def _what(err: Any, key: str, schema: type[BaseModel]) -> str:
    name, kind = key.split('.')[-1], err['type']
    value = mask_secrets(err['input'], name)
    if kind == 'extra_forbidden':
        return f'no such key; {advice_for_old_key(key) or _nearest(name, _fields_at(schema, err["loc"][:-1]))}'
    if kind == 'missing':
        return 'missing; it has no default'
    if kind == 'string_too_short':
        return f'is empty, as is a variable of the shell that is not set; write a value, or {key}=null for none'
    if kind.startswith('union_tag'):
        tag = value.get('name') if isinstance(value, dict) else value
        return f'its name {tag!r} must be {" or ".join(map(repr, MODEL_CONFIGS))}'
    if kind in _TYPES:
        return f'{value!r} must be {_TYPES[kind]}' + (_quotes(key, value) if kind == 'string_type' else '')
    said = err['msg'].replace('Input should be', 'must be')
    return f'{value!r} {said}' if said.startswith('must be') else f'{value!r}: {said}'


def _quotes(key: str, value: Any) -> str:
    """How to write a value that YAML takes for a number."""
    if isinstance(value, bool):
        return '; write null for none'
    if not isinstance(value, (int, float)):
        return ''
    return f""": put it in quotes, {key.split('.')[-1]}: '{value}' in a YAML, {key}="'{value}'" in a shell"""


def _nearest(word: str, known: list[str]) -> str:
    """A key that is spelled nearly so, or those that have the word as a part; else all of them."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    near = near or [key for key in known if f'_{word}_' in f'_{key}_']
    return f'did you mean {" or ".join(map(repr, near))}?' if near else f'known: {", ".join(sorted(known))}'


def _fields_at(schema: Any, loc: tuple) -> list[str]:
    """The keys that the schema has at a location that pydantic reports."""
    types = [schema]
    for part in loc:
        below = [child for parent in types for child in types_below(parent, part)]
        types = [MODEL_CONFIGS[part]] if part in MODEL_CONFIGS else below or types
    return [key for cls in types if hasattr(cls, 'model_fields') for key in cls.model_fields]

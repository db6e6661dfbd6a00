"""Reads a YAML and merges the command line into it with OmegaConf. `src/config/check.py` then checks the result.

This file imports neither torch nor Composer nor streaming, so programs that only read a YAML start at once.
"""

import copy
import difflib
import os
import re
from pathlib import Path
from types import NoneType
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel

from src.common.errors import UserError, mask_secrets
from src.config.old_keys import translate
from src.config.schema import Config, types_below

TAG_ERRORS = (ValueError, KeyError, AttributeError)  # PyYAML's for `!!int abc`, `!!bool abc`, `!!timestamp abc`
BASE_8_OR_60 = re.compile(r'[-+]?(0[0-7_]*[0-7]|[1-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)')  # in YAML 1.1


def load(argv: list[str]) -> DictConfig:
    """Reads the YAML that `argv` begins with and merges the `key=value` arguments after it; the last one wins.

    Raises UserError if no YAML is named, the file is missing or is not YAML, or an argument is not `key=value`.
    """
    if not argv or argv[0].startswith('-') or '=' in argv[0]:
        raise UserError(f'the first argument must be a YAML file, not {argv[0] if argv else "nothing"!r}.\n'
                        '  usage: composer main.py yamls/quickstart.yaml [key=value ...]')
    loaded = _read(Path(argv[0]))
    merged, command_line = copy.deepcopy(loaded), OmegaConf.create({})
    for arg in argv[1:]:
        merged, command_line = override(merged, arg), override(command_line, arg)
    return translate(merged, loaded, command_line)


def _read(path: Path) -> DictConfig:
    if not os.path.isfile(path):
        similar = difflib.get_close_matches(str(path), [str(p) for p in path.parent.glob('*.yaml')], n=1)
        problem = 'a folder, not a YAML file.' if os.path.isdir(path) else 'no such file.'
        raise UserError(f'{path}: {problem}' + (f' Did you mean {similar[0]}?' if similar else ''))
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, *TAG_ERRORS) as e:
        cause = type(e).__name__ if isinstance(e, TAG_ERRORS) else e  # their text quotes the value, maybe a secret
        raise UserError(f'{path}: cannot be read as YAML: {cause}') from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f'{path}: must be a mapping of settings, but holds a {type(loaded).__name__}')
    return loaded


def to_plain(cfg: Any) -> dict[str, Any]:
    """Turns any config (OmegaConf, pydantic or mapping) into plain dictionaries; resolves `${...}` and `~/`.

    Raises UserError if `${...}` names a key that does not exist.
    """
    if isinstance(cfg, BaseModel):
        return cfg.model_dump()
    cfg = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(dict(cfg))
    try:
        container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as e:
        raise UserError(_interpolation_error(str(e).splitlines()[0], e.full_key, cfg)) from None
    assert isinstance(container, dict)
    return {str(k): v for k, v in _expand_home(container).items()}


def _interpolation_error(text: str, key: Any, cfg: DictConfig) -> str:
    """The message for an interpolation that OmegaConf cannot resolve; `text` is OmegaConf's own, `key` holds it."""
    if target := re.search(r"(?:trying to access |Interpolation key ')(\w+)(\.?)", text):
        top, raw = target[1], OmegaConf.to_container(cfg)
        value = raw.get(top) if isinstance(raw, dict) else None
        if not target[2]:
            text += f'; for a variable of the shell write ${{oc.env:{top}}}'
        elif not isinstance(value, dict) or not value:
            return f'{top}: {mask_secrets(value, top)!r} must be a section with keys of its own; {key} uses one of them'
    return f'config: {text} (key: {key or "?"})'


def _expand_home(value: Any) -> Any:
    """Replaces `~/` or `~name/` at the start of any text by that user's home folder, as a shell does."""
    if isinstance(value, dict):
        return {key: _expand_home(child) for key, child in value.items()}
    return os.path.expanduser(value) if isinstance(value, str) and re.match(r'~[\w.-]*/', value) else value


def to_masked_yaml(c: Config) -> str:
    """The config as YAML text, with all defaults and with secrets masked."""
    return yaml.safe_dump(mask_secrets(to_plain(c)), sort_keys=False, width=120, allow_unicode=True)


def flatten_masked(cfg: Any) -> dict[str, Any]:
    """The config as {dotted key: value}, with secrets masked; without `local`, which may differ between nodes."""
    def walk(prefix: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or not value:
            return {prefix.removeprefix('.'): value}
        return {k: v for key, child in value.items() for k, v in walk(f'{prefix}.{key}', child).items()}
    return {k: v for k, v in walk('', mask_secrets(to_plain(cfg))).items()
            if k.split('.')[-1] not in ('local', 'data_local')}


# ---------------------------------------------------------------- the command line
def override(cfg: DictConfig, arg: str) -> DictConfig:
    """Merges one `key=value` into a config, which must not be used any more, and returns the merged config.

    The value is read as YAML, with two exceptions: `key={}` empties a section (a merge would change nothing), and a
    setting that takes only text gets the value unchanged (`run_name=12345`). Raises UserError if the argument is not
    `key=value`, or the value is missing or not YAML. Messages show only the key, because a value may be a secret.
    """
    key, equals, text = arg.partition('=')
    text = text.strip()
    if not equals or not key or key.startswith('-'):
        raise UserError(f'override {key!r} is not of the form key=value, as in max_duration=100ba or optimizer.lr=3e-4')
    if text in ('', '???'):  # OmegaConf reads ??? as "missing"
        raise UserError(f'override {key}={text}: has no value; write {key}=null for none. If the value comes from a '
                        'variable of the shell, that variable is empty')
    one = _one_setting(key, text)
    try:
        if text != '{}':
            merged = OmegaConf.unsafe_merge(cfg, one)  # `merge` copies the whole config: 20 ms for each setting
            assert isinstance(merged, DictConfig)
            return merged
        OmegaConf.update(cfg, key, {}, merge=False, force_add=True)
        return cfg
    except (TypeError, ValueError, IndexError, OmegaConfBaseException):  # the text of some quotes the value
        raise UserError(f'override {key}=...: the config has a section with keys there and the override a list, or the '
                        'other way round. Write a list as a whole, as in optimizer.betas=[0.9,0.95]') from None


def _one_setting(key: str, text: str) -> DictConfig:
    """A config with nothing but this setting."""
    is_text = _takes_only_text(key) and text[0] not in '\'"' and text not in ('null', 'Null', 'NULL', '~')
    if not is_text and BASE_8_OR_60.fullmatch(text):
        raise UserError(f'override {key}=...: YAML reads a number that begins with 0 in base 8, and one with colons in '
                        f"""base 60; write it in base 10, or put text in two pairs of quotes, as in {key}="'text'\"""")
    if not is_text and _ends_in_a_comment(text):
        raise UserError(f"override {key}=...: YAML reads '#' as the start of a comment here and drops the rest of the "
                        f"""value; put the value in two pairs of quotes, as in {key}="'no #3'\"""")
    try:
        if not is_text:
            return OmegaConf.from_dotlist([f'{key}={text}'])
        one = OmegaConf.create({})
        OmegaConf.update(one, key, text, force_add=True)
        return one
    except (yaml.YAMLError, OmegaConfBaseException, *TAG_ERRORS):  # the text of some quotes the value
        raise UserError(f'override {key}=...: its value cannot be read as YAML; put text in two pairs of quotes, as in '
                        f'''{key}="'text'"''') from None


def _ends_in_a_comment(text: str) -> bool:
    try:
        ends = [token.end_mark.index for token in yaml.scan(text) if token.end_mark.index > token.start_mark.index]
    except yaml.YAMLError:
        return False
    return '#' in text[max(ends, default=0):]


def _takes_only_text(key: str) -> bool:
    """Whether the schema allows only text or null for this key."""
    types: list[Any] = [Config]
    for part in key.split('.'):
        types = [child for parent in types for child in types_below(parent, part)]
    return str in types and {*types} <= {str, NoneType}

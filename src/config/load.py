"""YAML and command line to one config: `load` merges the two with OmegaConf. `src/config/check.py` then checks it.

Nothing here imports torch, Composer or streaming: programs that only need a YAML start at once.
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

NOT_OF_ITS_TAG = (ValueError, KeyError, AttributeError)  # PyYAML's, of `!!int abc`, `!!bool abc`, `!!timestamp abc`
OTHER_BASES = re.compile(r'[-+]?(0[0-7_]*[0-7]|[1-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)')  # 8 and 60, in YAML 1.1


def load(argv: list[str]) -> DictConfig:
    """Merges `YAML [key=value ...]`, the command line without the program's name; later wins.

    Raises UserError where there is no YAML, a file is missing or does not parse, or an override is not `key=value`.
    """
    if not argv or argv[0].startswith('-') or '=' in argv[0]:
        raise UserError(f'the first argument must be a YAML file, not {argv[0] if argv else "nothing"!r}.\n'
                        '  usage: composer main.py yamls/quickstart.yaml [key=value ...]')
    loaded = _read(Path(argv[0]))
    merged, given = loaded, OmegaConf.create({})
    for arg in argv[1:]:
        merged, given = override(merged, arg), override(given, arg)
    return translate(merged, loaded, given)


def _read(path: Path) -> DictConfig:
    if not os.path.isfile(path):
        near = difflib.get_close_matches(str(path), [str(p) for p in path.parent.glob('*.yaml')], n=1)
        what = 'a folder, not a YAML file.' if os.path.isdir(path) else 'no such file.'
        raise UserError(f'{path}: {what}' + (f' Did you mean {near[0]}?' if near else ''))
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, *NOT_OF_ITS_TAG) as e:
        said = type(e).__name__ if isinstance(e, NOT_OF_ITS_TAG) else e  # which quote the value, maybe a secret
        raise UserError(f'{path}: cannot be read as YAML: {said}') from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f'{path}: must be a mapping of settings, but holds a {type(loaded).__name__}')
    return loaded


def to_plain(cfg: Any) -> dict[str, Any]:
    """Any config (OmegaConf, pydantic or mapping) as plain containers, interpolations and home folders (`~/`) resolved.

    Raises UserError where an interpolation `${...}` points nowhere.
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


def _unresolved(said: str, key: Any, cfg: DictConfig) -> str:
    """What to say of an interpolation that OmegaConf does not resolve."""
    if refers := re.search(r"(?:trying to access |Interpolation key ')(\w+)(\.?)", said):
        top, raw = refers[1], OmegaConf.to_container(cfg)
        value = raw.get(top) if isinstance(raw, dict) else None
        if not refers[2]:
            said += f'; for a variable of the shell write ${{oc.env:{top}}}'
        elif not isinstance(value, dict) or not value:
            return f'{top}: {mask_secrets(value, top)!r} must be a section with keys of its own; {key} refers to one'
    return f'config: {said} (key: {key or "?"})'


def _at_home(value: Any) -> Any:
    """A copy in which texts that begin with `~/` or `~name/` begin with that user's home folder, as in a shell."""
    if isinstance(value, dict):
        return {key: _at_home(child) for key, child in value.items()}
    return os.path.expanduser(value) if isinstance(value, str) and re.match(r'~[\w.-]*/', value) else value


def to_masked_yaml(c: Config) -> str:
    """A config as YAML, with its defaults; secrets are masked."""
    return yaml.safe_dump(mask_secrets(to_plain(c)), sort_keys=False, width=120, allow_unicode=True)


def flatten_masked(cfg: Any) -> dict[str, Any]:
    """Dotted key to value, secrets masked, without what may differ between nodes: where each copies its shards to."""
    def walk(prefix: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or not value:
            return {prefix.removeprefix('.'): value}
        return {k: v for key, child in value.items() for k, v in walk(f'{prefix}.{key}', child).items()}
    return {k: v for k, v in walk('', mask_secrets(to_plain(cfg))).items()
            if k.split('.')[-1] not in ('local', 'data_local')}


# ---------------------------------------------------------------- the command line
def override(cfg: DictConfig, arg: str) -> DictConfig:
    """Merges one `key=value` into a config.

    The value is YAML, with two exceptions: `key={}` empties a section, where a merge would change nothing, and the
    value of a setting that takes only text is text as it stands (`run_name=12345`). Raises UserError where the argument
    is not `key=value`, has no value, or has one that is not YAML. A value may be a secret, so messages name only the
    key.
    """
    key, equals, text = arg.partition('=')
    text = text.strip()
    if not equals or not key or key.startswith('-'):
        raise UserError(f'override {key!r} is not of the form key=value, as in max_duration=100ba or optimizer.lr=3e-4')
    if text in ('', '???'):  # OmegaConf takes the latter for a value that is not given yet
        raise UserError(f'override {key}={text}: has no value. If it comes from a variable of the shell, that variable '
                        f'is empty; for no value write {key}=null')
    one = _one_setting(key, text)
    try:
        if text != '{}':
            merged = OmegaConf.merge(cfg, one)
            assert isinstance(merged, DictConfig)
            return merged
        merged = copy.deepcopy(cfg)
        OmegaConf.update(merged, key, {}, merge=False, force_add=True)
        return merged
    except (TypeError, ValueError, IndexError, OmegaConfBaseException):  # some quote the value
        raise UserError(f'override {key}=...: a list stands where a section with keys of its own has to, or a key of a '
                        'section where a list does. A list is given whole, as in optimizer.betas=[0.9,0.95]') from None


def _one_setting(key: str, text: str) -> DictConfig:
    """A config with nothing but this setting."""
    as_it_stands = _takes_only_text(key) and text[0] not in '\'"' and text not in ('null', 'Null', 'NULL', '~')
    if not as_it_stands and OTHER_BASES.fullmatch(text):
        raise UserError(f'override {key}=...: YAML reads a number that begins with 0 in base 8, and one with colons in '
                        f"""base 60; write it in base 10, or put text in two pairs of quotes, as in {key}="'text'\"""")
    if not as_it_stands and _ends_in_a_comment(text):
        raise UserError(f"override {key}=...: YAML reads '#' as the start of a comment here and drops the rest of the "
                        f"""value; put the value in two pairs of quotes, as in {key}="'no #3'\"""")
    try:
        if not as_it_stands:
            return OmegaConf.from_dotlist([f'{key}={text}'])
        one = OmegaConf.create({})
        OmegaConf.update(one, key, text, force_add=True)
        return one
    except (yaml.YAMLError, OmegaConfBaseException, *NOT_OF_ITS_TAG):  # some quote the value
        raise UserError(f'override {key}=...: its value cannot be read as YAML; put text in two pairs of quotes, as in '
                        f'''{key}="'text'"''') from None


def _ends_in_a_comment(text: str) -> bool:
    try:
        ends = [token.end_mark.index for token in yaml.scan(text) if token.end_mark.index > token.start_mark.index]
    except yaml.YAMLError:
        return False
    return '#' in text[max(ends, default=0):]


def _takes_only_text(key: str) -> bool:
    """Whether the schema allows nothing but text, or null, for a setting."""
    types: list[Any] = [Config]
    for part in key.split('.'):
        types = [child for parent in types for child in types_below(parent, part)]
    return str in types and {*types} <= {str, NoneType}

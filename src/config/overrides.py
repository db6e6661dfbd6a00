"""One `key=value` of the command line, merged into the config that the YAML gave."""

import copy
import re
from types import NoneType
from typing import Any, Union, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from pydantic import BaseModel

from src.common.errors import UserError
from src.config.schema import Config

NULL = ('null', 'Null', 'NULL', '~')  # as YAML spells it
NOT_OF_ITS_TAG = (ValueError, KeyError, AttributeError)  # PyYAML's, of `!!int abc`, `!!bool abc`, `!!timestamp abc`
OTHER_BASES = re.compile(r'[-+]?(0[0-7_]*[0-7]|[1-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)')  # 8 and 60, in YAML 1.1


def override(cfg: DictConfig, arg: str) -> DictConfig:
    """Merges one `key=value` into a config.

    The value is YAML, with two exceptions: `key={}` empties a section, where a merge would change nothing, and the value of a
    setting that takes only text is text as it stands (`run_name=12345`).

    Args:
        cfg: The config so far.
        arg: The argument.

    Returns:
        The config with the value.

    Raises:
        UserError: The argument is not `key=value`, has no value, or has one that is not YAML. A value may be a secret, so
            messages name only the key.
    """
    key, equals, text = arg.partition('=')
    text = text.strip()
    if not equals or not key or key.startswith('-'):
        raise UserError(f'override {key!r} is not of the form key=value, as in max_duration=100ba or optimizer.lr=3e-4')
    if text in ('', '???'):  # OmegaConf takes the latter for a value that is not given yet
        raise UserError(f'override {key}={text}: has no value. If it comes from a variable of the shell, that variable '
                        f'is empty; for no value write {key}=null')
    as_it_stands = takes_only_text(key) and text[0] not in '\'"' and text not in NULL
    if not as_it_stands and OTHER_BASES.fullmatch(text):
        raise UserError(f'override {key}=...: YAML reads a number that begins with 0 in base 8, and one with colons in '
                        f"""base 60; write it in base 10, or put text in two pairs of quotes, as in {key}="'text'\"""")
    try:
        if not as_it_stands and _ends_in_a_comment(text):
            raise UserError(f"override {key}=...: YAML reads '#' as the start of a comment here and drops the rest of the value; "
                            f"""put the value in two pairs of quotes, as in {key}="'no #3'\"""")
        if text == '{}' or as_it_stands:
            cfg = copy.deepcopy(cfg)
            OmegaConf.update(cfg, key, {} if text == '{}' else text, merge=False, force_add=True)
            return cfg
        merged = OmegaConf.merge(cfg, OmegaConf.from_dotlist([f'{key}={text}']))
    except UserError:
        raise
    except (yaml.YAMLError, *NOT_OF_ITS_TAG, TypeError, IndexError, OmegaConfBaseException) as e:  # some quote it
        of_keys = text == '{}' or isinstance(e, (TypeError, IndexError, OmegaConfBaseException))
        if isinstance(e, GrammarParseError) or not of_keys:
            raise UserError(f'override {key}=...: its value cannot be read as YAML; put text in two pairs of quotes, '
                            f'''as in {key}="'text'"''') from None
        raise UserError(f'override {key}=...: a list stands where a section with keys of its own has to, or a key of a '
                        'section where a list does. A list is given whole, as in optimizer.betas=[0.9,0.95]') from None
    assert isinstance(merged, DictConfig)
    return merged


def _ends_in_a_comment(text: str) -> bool:
    ends = [token.end_mark.index for token in yaml.scan(text) if token.end_mark.index > token.start_mark.index]
    return '#' in text[max(ends, default=0):]


def takes_only_text(key: str) -> bool:
    """Whether the schema allows nothing but text, or null, for a setting."""
    types = [Config]
    for part in key.split('.'):
        types = [child for parent in types for child in _types_below(parent, part)]
    return str in types and {*types} <= {str, NoneType}


def _types_below(parent: Any, part: str) -> list[Any]:
    if isinstance(parent, type) and issubclass(parent, BaseModel):
        return alternatives(parent.model_fields[part].annotation) if part in parent.model_fields else []
    return alternatives(get_args(parent)[1]) if get_origin(parent) is dict else []


def alternatives(annotation: Any) -> list[Any]:
    """The members of a Union, or the type itself."""
    return list(get_args(annotation)) if get_origin(annotation) is Union else [annotation]

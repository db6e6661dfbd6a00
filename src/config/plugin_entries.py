"""The keywords of a callback, logger or algorithm, as a section of the schema."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, get_type_hints

from pydantic import AfterValidator, ConfigDict, TypeAdapter, create_model, field_validator
from pydantic.errors import PydanticSchemaGenerationError
from pydantic_core import PydanticCustomError

from src.config.schema import Section


def _limit(what: str, holds: Callable[[Any], bool]) -> AfterValidator:
    def check(value: Any) -> Any:
        if isinstance(value, (int, float, str)) and not holds(value):
            raise PydanticCustomError('limit', 'must be {what}', {'what': what})
        return value
    return AfterValidator(check)


# What Composer finds out in mid-run, or never; a class of a fork has limits of its own for the second kind
_ABOVE_0 = _limit('greater than 0', lambda value: isinstance(value, str) or value > 0)
LIMITS = dict.fromkeys(('window_size', 'flush_interval', 'buffer_size', 'clipping_threshold'), _ABOVE_0)
COMPOSERS_LIMITS = {
    'batch_log_interval': _ABOVE_0, 'dist_aggregate_batch_interval': _ABOVE_0,
    'skip_batches': _limit('greater than or equal to 0', lambda value: isinstance(value, str) or value >= 0),
    'clipping_type': _limit("'norm', 'value' or 'adaptive'", lambda value: value in ('norm', 'value', 'adaptive'))}


class Keywords(Section):
    """What every such section has in common: a type that only Python can check is taken as it is."""

    model_config = ConfigDict(arbitrary_types_allowed=True, str_min_length=0, allow_inf_nan=True)

    _is_a_number = field_validator('*')(_limit('a number', lambda value: value == value).func)


class SomeKeywords(Keywords):
    """Those that a class names, where it takes others as well."""

    model_config = ConfigDict(extra='allow')


@cache
def keywords_of(cls: Any) -> type[Section]:
    """A section with a key for each keyword that the class takes, of its type and with its default."""
    parameters = inspect.signature(cls).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    hints = _hints(cls)
    limits = LIMITS | (COMPOSERS_LIMITS if cls.__init__.__module__.startswith('composer.') else {})
    hints |= {key: Annotated[hints.get(key, Any), limit] for key, limit in limits.items()}
    fields: dict[str, Any] = {p.name: (hints.get(p.name, Any), ... if p.default is p.empty else p.default)
                              for p in named}
    takes_others = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return create_model(cls.__name__, __base__=SomeKeywords if takes_others else Keywords, **fields)


def _hints(cls: Any) -> dict[str, Any]:
    """The types of a class's keywords, where pydantic can check them; none where its module imports one for type
    checkers alone."""
    try:
        hints = get_type_hints(cls.__init__)
    except NameError:
        return {}
    return {name: hint for name, hint in hints.items() if _can_be_checked(hint)}


def _can_be_checked(hint: Any) -> bool:
    try:
        TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticSchemaGenerationError:
        return False
    return True

"""Makes a section of the schema from the arguments of a callback, logger or algorithm."""

import inspect
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, get_type_hints

from pydantic import AfterValidator, ConfigDict, TypeAdapter, create_model, field_validator
from pydantic.errors import PydanticSchemaGenerationError
from pydantic_core import PydanticCustomError

from src.config.schema import Section


def _limit(description: str, is_valid: Callable[[Any], bool]) -> AfterValidator:
    """Refuses a value that is not valid; the message says that it must be `description`."""
    def check(value: Any) -> Any:
        if isinstance(value, (int, float, str)) and not is_valid(value):
            raise PydanticCustomError('limit', 'must be {description}', {'description': description})
        return value
    return AfterValidator(check)


# Values that Composer refuses only during the run, or never. COMPOSER_LIMITS apply to Composer's own classes alone
_ABOVE_0 = _limit('greater than 0', lambda value: isinstance(value, str) or value > 0)
LIMITS = dict.fromkeys(('window_size', 'flush_interval', 'buffer_size', 'clipping_threshold'), _ABOVE_0)
COMPOSER_LIMITS = {
    'batch_log_interval': _ABOVE_0, 'dist_aggregate_batch_interval': _ABOVE_0,
    'skip_batches': _limit('greater than or equal to 0', lambda value: isinstance(value, str) or value >= 0),
    'clipping_type': _limit("'norm', 'value' or 'adaptive'", lambda value: value in ('norm', 'value', 'adaptive'))}


class Keywords(Section):
    """Base of all these sections. Values whose type pydantic does not know are accepted without a check."""

    model_config = ConfigDict(arbitrary_types_allowed=True, str_min_length=0, allow_inf_nan=True)

    _is_a_number = field_validator('*')(_limit('a number', lambda value: value == value).func)


class SomeKeywords(Keywords):
    """Base for a class that takes `**kwargs`: other keys are allowed too."""

    model_config = ConfigDict(extra='allow')


def find_class(entry: Any) -> Any:
    """The class of a registry's entry: a class, or where it is, as `module:Class`; the module is imported only now."""
    return pkgutil.resolve_name(entry) if isinstance(entry, str) else entry


@cache
def keywords_of(cls: Any) -> type[Section]:
    """A section with one key for each argument of the class, with the argument's type and default."""
    parameters = inspect.signature(cls).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    hints = _hints(cls)
    limits = LIMITS | (COMPOSER_LIMITS if cls.__init__.__module__.startswith('composer.') else {})
    hints |= {key: Annotated[hints.get(key, Any), limit] for key, limit in limits.items()}
    fields: dict[str, Any] = {p.name: (hints.get(p.name, Any), ... if p.default is p.empty else p.default)
                              for p in named}
    takes_any_key = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return create_model(cls.__name__, __base__=SomeKeywords if takes_any_key else Keywords, **fields)


def _hints(cls: Any) -> dict[str, Any]:
    """The types of a class's arguments, as far as pydantic can check them.

    Empty where a type is imported only for type checkers (`if TYPE_CHECKING`), so that its name is unknown here.
    """
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

"""The error class for mistakes of the user, and helpers that describe errors of other libraries."""

import argparse
import errno
import re
from collections.abc import Iterator, Mapping
from typing import Any, Optional

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # `errno` of an OSError
SECRET = re.compile(r'(^|_)(api_?key|key|token|password|passwd|secret|credential|credentials|auth)$', re.IGNORECASE)


class UserError(ValueError):
    """A mistake that the user can correct: shown as one message, without a traceback."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, and the second line too if the first ends in a colon."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return f'{first} {more[0].strip()}' if first.endswith(':') and more else first


def is_out_of_memory(e: BaseException) -> bool:
    """Tells whether an error means that a GPU or this machine has run out of memory."""
    return (isinstance(e, MemoryError) or type(e).__name__ == 'OutOfMemoryError'  # torch's
            or "DefaultCPUAllocator: can't allocate memory" in str(e))


def positive_int(text: str) -> int:
    """Converts a command-line argument to a whole number above 0, as `type=` of argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number above 0')
    return int(text)


def mask_secrets(value: Any, key: str = '') -> Any:
    """Returns a copy with `***` in place of keys, tokens and passwords, also inside URLs."""
    if SECRET.search(key) and value is not None:
        return '***'
    if isinstance(value, Mapping):
        return {k: mask_secrets(v, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [mask_secrets(v) for v in value]
    return re.sub(r'(\w+://)[^/\s]+@', r'\1***@', value) if isinstance(value, str) else value


def exception_chain(error: Optional[BaseException]) -> Iterator[BaseException]:
    """Yields an error and the errors that caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

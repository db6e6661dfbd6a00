"""The one error class of the kit, and how others' errors are quoted."""


class UserError(ValueError):
    """Something that the user can mend: shown as one message, without a traceback."""


def first_line(error: BaseException) -> str:
    """What another library says of a mistake, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

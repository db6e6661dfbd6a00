"""The one error class of the kit."""


class UserError(ValueError):
    """Something that the user can mend: shown as one message, without a traceback."""

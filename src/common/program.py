"""Runs a program in one process: a mistake of the user is shown as one message, Ctrl-C shows nothing."""

import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from src.common.errors import UserError
from src.common.machine import set_up_output


def run(main: Callable[[Namespace], Any], parse_args: Callable[[list[str]], Namespace]) -> None:
    """Calls `main` with the parsed command line. Exits with 1 after a UserError, and with 130 after Ctrl-C."""
    set_up_output()
    try:
        main(parse_args(sys.argv[1:]))
    except UserError as e:
        sys.exit(f'error: {e}')
    except KeyboardInterrupt:
        sys.exit(130)

"""The shell of a program in one process: a mistake of the user ends in one message, Ctrl-C ends in silence."""

import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from src.common.errors import UserError
from src.common.machine import set_up_output


def run(main: Callable[[Namespace], Any], parse_args: Callable[[list[str]], Namespace]) -> None:
    """Calls `main` with the parsed command line; leaves the process with status 1 after a mistake of the user."""
    set_up_output()
    try:
        main(parse_args(sys.argv[1:]))
    except UserError as e:
        sys.exit(f'error: {e}')
    except KeyboardInterrupt:
        sys.exit(130)

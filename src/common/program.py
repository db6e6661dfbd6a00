"""Runs a program in one process: a mistake of the user is shown as one message, Ctrl-C shows nothing."""

import contextlib
import io
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any, NoReturn

from src.common.errors import UserError
from src.common.machine import set_up_output


def leave(error: UserError) -> NoReturn:
    """Ends the process with the message of an error."""
    sys.exit(f'error: {error}')


def check_early(check: Callable[[], Any], on_error: Callable[[UserError], NoReturn] = leave) -> None:
    """Calls `check`, which looks for mistakes on the command line, before a program imports torch and Composer.

    Their import takes seconds. `on_error` ends the process after a UserError. The program reads its command line once
    more when it runs, so what `check` prints is shown only before a mistake.
    """
    set_up_output()
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            check()
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException as e:  # also SystemExit: argparse has printed what is wrong
        print(printed.getvalue(), end='', file=sys.stderr)
        if isinstance(e, UserError):
            on_error(e)
        raise


def add_checkpoint_arguments(parser: ArgumentParser) -> None:
    """Adds --tokenizer and --yaml, for a checkpoint whose manifest is missing or lacks them."""
    parser.add_argument('--tokenizer', metavar='NAME', help="a hub name or a folder; default: the run's tokenizer")
    parser.add_argument('--yaml', nargs='+', metavar=('YAML', 'key=value'),
                        help='config of the run, for a checkpoint without a manifest')


def run(main: Callable[[Namespace], Any], parse_args: Callable[[list[str]], Namespace]) -> None:
    """Calls `main` with the parsed command line. Exits with 1 after a UserError, and with 130 after Ctrl-C."""
    set_up_output()
    try:
        main(parse_args(sys.argv[1:]))
    except UserError as e:
        leave(e)
    except KeyboardInterrupt:
        sys.exit(130)

"""Runs a program in every rank: all ranks fail together, and a mistake of the user is shown as one message."""

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from src.ranks import environment, rendezvous
from src.ranks.failure_watch import FailureWatch
from src.ranks.stop import EXIT_STOPPED, Stopped, StopRequest

log = logging.getLogger('src')


def log_to_stderr() -> None:
    """Prints the kit's log messages to stderr, on rank 0 only."""
    log.handlers = [logging.StreamHandler() if environment.rank() == 0 else logging.NullHandler()]
    log.setLevel(logging.INFO)
    log.propagate = False


def run(work: Callable[[FailureWatch], Any]) -> int:
    """Calls `work`, and returns the exit code of this rank: 0, EXIT_STOPPED, 130 after Ctrl-C, or 1 after an error.

    `work` gets the watch that ends this rank when another one fails.
    """
    from torch.distributed.checkpoint.api import CheckpointException  # not an Exception, but a BaseException

    warnings.filterwarnings('ignore', category=UserWarning, module='(composer|torchmetrics)')
    with FailureWatch(StopRequest()) as watch:
        try:
            work(watch)
        except Stopped as e:
            log.info('%s', e)
            watch.ignore_signals()
            return EXIT_STOPPED
        except KeyboardInterrupt:
            return 128 + 2
        except (Exception, CheckpointException) as e:
            watch.report_crash(e)
            return 1
    return 0


def leave(code: int) -> NoReturn:
    """Ends this process with an exit code."""
    if code in (0, EXIT_STOPPED):  # after a failure, leaving the group could wait for ranks that are gone
        rendezvous.leave()
    sys.exit(code)

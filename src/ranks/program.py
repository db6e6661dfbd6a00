"""The shell of a program that runs in every rank: ranks fail together, a mistake of the user ends in one message."""

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
    """Shows the kit's own messages, on rank 0 alone."""
    log.handlers = [logging.StreamHandler() if environment.rank() == 0 else logging.NullHandler()]
    log.setLevel(logging.INFO)
    log.propagate = False


def run(work: Callable[[FailureWatch], Any]) -> int:
    """Does the work of this rank, and returns its exit code: 0, EXIT_STOPPED, 130 after Ctrl-C, or 1.

    `work` is called with the watch that ends this rank when another one fails.
    """
    from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

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
    """Ends this process."""
    if code in (0, EXIT_STOPPED):  # after a failure it could wait for ranks that are gone
        rendezvous.leave()
    sys.exit(code)

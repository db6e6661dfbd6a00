"""Checks a config before torch and Composer are imported, because their import takes seconds."""

import os
from typing import Any, Optional

from src.config.check import check_without_torch
from src.config.load import load
from src.ranks import environment
from src.training.plugins import REGISTRIES


def set_up_rank(argv: list[str]) -> None:
    """Prepares a rank, and checks the arguments of `main.py`. A mistake ends the process with one message."""
    environment.set_up_rank(lambda: check_command_line(argv))


def check_command_line(argv: list[str]) -> None:
    """Checks the arguments of `main.py`. Raises UserError."""
    check_config(load([arg for arg in argv if arg != '--dry_run']))


def check_config(cfg: Any, num_nodes: Optional[int] = None) -> None:
    """Checks a config for the ranks that the launcher has started, on `num_nodes` or as many as it says.

    Raises UserError, which lists the mistakes that need no import of torch to be found (see `check_without_torch`).
    """
    environment.check_environment(os.environ)
    me = environment.this_process()
    check_without_torch(cfg, REGISTRIES, me.world_size, num_nodes or me.world_size // me.local_world_size)

"""Helpers of the checkpoint tests: messages of refused runs, settings of sharded runs, an object that runs code."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from src.common.errors import UserError

QUICKSTART = 'yamls/quickstart.yaml'
SHARDED = ('fsdp_config.sharding_strategy=FULL_SHARD', 'fsdp_config.state_dict_type=sharded')
MUON = ('optimizer.name=muon', 'scheduler.name=warmup_stable_decay')


def refusal(run: Callable[..., Any], *args: Any) -> str:
    """Returns the message of the UserError that a run ends with."""
    with pytest.raises(UserError) as e:
        run(*args)
    return str(e.value)


class MakesFolder:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)

"""What the ranks of a run tell each other, and where they do not agree."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from composer.utils import dist

from src.common.errors import UserError, first_line
from src.common.machine import low_shared_memory_hint
from src.ranks.environment import Process, this_machine, this_process

CHECK = ('check that every node is started, each with its own NODE_RANK and all with the same WORLD_SIZE, MASTER_ADDR '
         'and MASTER_PORT; that MASTER_ADDR is an address of node 0 which the others reach (127.0.0.1 and 0.0.0.0 are '
         'not) and no firewall closes its ports; and, where a node has several networks, set GLOO_SOCKET_IFNAME and '
         'NCCL_SOCKET_IFNAME')


def check_ranks_agree(what: str, settings: Mapping[str, Any]) -> None:
    """Compares settings among all ranks, which must all call this.

    `what` is the start of the message, as `config`. `settings` are flat, from name to value, with secrets masked:
    values are shown, and compared as they are shown. Where ranks differ, every rank raises UserError, which names the
    setting, its values, and where each holds.
    """
    errors = find_differences(gather_from_ranks({name: repr(value) for name, value in settings.items()}))
    if errors:
        head = f'{what}: the nodes disagree; start every node with the same YAML, arguments and files:'
        more = [f'and {len(errors) - 20} more'] if len(errors) > 20 else []
        raise UserError('\n  - '.join([head, *errors[:20], *more]))


def gather_from_ranks(value: Any) -> dict[Process, Any]:
    """What each rank calls this with, in the order of the ranks."""
    with explain_network_errors('the ranks cannot exchange messages'):
        return dict(dist.all_gather_object((this_process(), value)))


def find_differences(told: Mapping[Process, Mapping[str, str]]) -> list[str]:
    """The settings that are not the same on all ranks, with their values and where each holds."""
    errors = []
    for name in sorted({name for settings in told.values() for name in settings}):
        at: dict[str, list[Process]] = {}
        for process, settings in told.items():
            at.setdefault(settings.get(name, 'not set'), []).append(process)
        if len(at) > 1:
            values = (f'{value} on {describe_ranks(some, told)}' for value, some in at.items())
            errors.append(f'{name} is {" and ".join(values)}')
    return errors


def describe_ranks(some: Iterable[Process], ranks: Iterable[Process]) -> str:
    """Where these ranks are: whole nodes by name, others one by one."""
    some, names = set(some), {}
    others = {(other.node, other.host) for other in set(ranks) - some}
    for process in sorted(some):
        node = f'node {process.node} ({process.host})'
        is_part = (process.node, process.host) in others
        names[f'rank {process.rank} of {node}' if is_part else node] = None
    return ', '.join(list(names)[:6]) + (f' and {len(names) - 6} more' if len(names) > 6 else '')


@contextmanager
def explain_network_errors(what: str) -> Iterator[None]:
    """torch's errors (all of them RuntimeErrors), with the node's settings and what to look at."""
    started = time.monotonic()
    try:
        yield
    except RuntimeError as e:
        env = os.environ
        if 'EADDRINUSE' in str(e):
            raise UserError(f'MASTER_PORT: {env["MASTER_PORT"]} is in use on {this_machine()}: by another run, or by a '
                            'second node with NODE_RANK=0; set another, on every node') from e
        raise UserError(f'{this_machine()}: {what}: {first_line(e)}, after {time.monotonic() - started:.0f} s, with '
                        f'MASTER_ADDR:MASTER_PORT {env.get("MASTER_ADDR")}:{env.get("MASTER_PORT")} and WORLD_SIZE '
                        f'{env.get("WORLD_SIZE")}{low_shared_memory_hint()}; {CHECK}') from e

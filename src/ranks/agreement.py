"""Compares settings between ranks, names ranks in messages, and explains errors of the network."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from composer.utils import dist

from src.common.errors import UserError, first_line
from src.common.machine import low_shared_memory_hint
from src.ranks.environment import Process, this_machine, this_process

NETWORK_ADVICE = (
    'start every node with its own NODE_RANK, and all with the same WORLD_SIZE, MASTER_ADDR and MASTER_PORT; '
    'MASTER_ADDR must be an address of node 0 that the other nodes reach (127.0.0.1 and 0.0.0.0 are not); no firewall '
    'may close the ports; if a node has several networks, set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME')
MAX_SHOWN = 20  # differences that a message lists


def check_ranks_agree(what: str, settings: Mapping[str, Any]) -> None:
    """Compares settings between all ranks. Every rank must call this function.

    The message begins with `what`, such as `config`. `settings` maps names to values without nesting. Mask secrets
    before: the message shows values, and `repr(value)` is compared. Where ranks differ, every rank raises UserError,
    which names each setting, its values, and the ranks that have each value.
    """
    errors = find_differences(gather_from_ranks({name: repr(value) for name, value in settings.items()}))
    if errors:
        head = f'{what}: the nodes disagree; start every node with the same YAML, arguments and files:'
        more = [f'and {len(errors) - MAX_SHOWN} more'] if len(errors) > MAX_SHOWN else []
        raise UserError('\n  - '.join([head, *errors[:MAX_SHOWN], *more]))


def gather_from_ranks(value: Any) -> dict[Process, Any]:
    """Returns the `value` of every rank, in the order of the ranks. Every rank must call this function."""
    with explain_network_errors('the ranks cannot exchange messages'):
        return dict(dist.all_gather_object((this_process(), value)))


def find_differences(settings_of_ranks: Mapping[Process, Mapping[str, str]]) -> list[str]:
    """Describes each setting that is not the same on all ranks: its name, its values, and the ranks of each value."""
    errors = []
    for name in sorted({name for settings in settings_of_ranks.values() for name in settings}):
        ranks_by_value: dict[str, list[Process]] = {}
        for process, settings in settings_of_ranks.items():
            ranks_by_value.setdefault(settings.get(name, 'not set'), []).append(process)
        if len(ranks_by_value) > 1:
            errors.append(f'{name} is ' + ' and '.join(
                f'{value} on {describe_ranks(ranks, settings_of_ranks)}' for value, ranks in ranks_by_value.items()))
    return errors


def describe_ranks(some: Iterable[Process], all_ranks: Iterable[Process]) -> str:
    """Names some of all ranks: by their node where all ranks of that node are among them, else one by one."""
    some, names = set(some), {}
    nodes_of_others = {(other.node, other.host) for other in set(all_ranks) - some}
    for process in sorted(some):
        node = f'node {process.node} ({process.host})'
        is_part_of_node = (process.node, process.host) in nodes_of_others
        names[f'rank {process.rank} of {node}' if is_part_of_node else node] = None
    return ', '.join(list(names)[:6]) + (f' and {len(names) - 6} more' if len(names) > 6 else '')


@contextmanager
def explain_network_errors(what: str) -> Iterator[None]:
    """Turns a RuntimeError of torch's network into a UserError: what failed, on which node, what to check."""
    started = time.monotonic()
    try:
        yield
    except RuntimeError as e:
        env = os.environ
        if 'EADDRINUSE' in str(e):
            raise UserError(f'MASTER_PORT: {env["MASTER_PORT"]} is in use on {this_machine()} by another run, or by a '
                            'second node with NODE_RANK=0; set another port, on every node') from e
        raise UserError(f'{this_machine()}: {what}: {first_line(e)}, after {time.monotonic() - started:.0f} s, with '
                        f'MASTER_ADDR:MASTER_PORT {env.get("MASTER_ADDR")}:{env.get("MASTER_PORT")} and WORLD_SIZE '
                        f'{env.get("WORLD_SIZE")}{low_shared_memory_hint()}; {NETWORK_ADVICE}') from e

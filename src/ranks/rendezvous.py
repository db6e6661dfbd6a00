"""Connects the ranks of a run within `dist_timeout`, and disconnects them at the end."""

import json
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import TimeoutError as NoAnswer
from datetime import timedelta
from typing import Any

import psutil
import torch
from composer.utils import dist, get_device

from src.common.errors import UserError
from src.common.workers import run_in_background
from src.ranks.agreement import NETWORK_ADVICE, describe_ranks, explain_network_errors, find_differences
from src.ranks.environment import Process, this_machine, this_process

VERDICT = 'meet/verdict'  # key in the store: 'ok', or why the ranks do not fit together
SAME_WORLD_ADVICE = ('start every node with its own NODE_RANK, and all with the same composer -n, WORLD_SIZE, '
                     'MASTER_ADDR and MASTER_PORT')


def initialize(timeout: float) -> None:
    """Waits for all ranks, and makes the default process group, if there is none yet.

    Before torch connects the ranks, each rank registers in the store of rank 0. So rank 0 can name the ranks that are
    missing, started twice or set up differently. torch 2.7 alone names no rank, and waits longer than `timeout`: up to
    twice as long for a node 0 that does not answer, five times for gloo's connections, and for ever where another
    program uses the port.

    `timeout` is `dist_timeout` in seconds, also that of every later collective. Raises UserError if ranks are
    missing or do not fit together, where they cannot connect (up to 5 seconds after `timeout`), or where
    LOCAL_WORLD_SIZE is larger than the node's number of GPUs.
    """
    if torch.distributed.is_initialized() or dist.get_world_size() == 1:
        dist.initialize_dist(get_device(None), timeout)
        return
    if torch.cuda.is_available() and dist.get_local_world_size() > torch.cuda.device_count():
        raise UserError(f'LOCAL_WORLD_SIZE: {dist.get_local_world_size()} processes on {this_machine()}, which has '
                        f'{torch.cuda.device_count()} GPUs; set composer -n to the number of GPUs')
    deadline = time.monotonic() + timeout
    with explain_network_errors(f'cannot connect to all ranks (dist_timeout: {timeout:g} s)'):
        # Under torchrun its agents have already connected, and have the store.
        store = None if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True' else _register(timeout, deadline)
    _choose_network()
    with explain_network_errors('all ranks have registered, but cannot connect to each other '
                                f'(dist_timeout: {timeout:g} s)'):
        # `get_device` sets the current GPU of its thread: both threads need it
        _call_with_timeout(max(deadline - time.monotonic(), 5), lambda: dist.initialize_dist(get_device(None), timeout))
    get_device(None)
    del store  # kept until here, so that torch uses the same server on rank 0


def connect_hosts(timeout: float) -> Any:
    """Returns a process group of all ranks whose collectives run on the hosts, by gloo. Call on every rank.

    `timeout` is in seconds. Raises UserError where the ranks cannot connect.
    """
    with explain_network_errors(f'cannot connect to all ranks by gloo (dist_timeout: {timeout:g} s)'):
        return _call_with_timeout(timeout, lambda: torch.distributed.new_group(
            backend='gloo', timeout=timedelta(seconds=timeout)))


def leave() -> None:
    """Ends the process group, if there is one.

    gloo's threads may still hold the tensors of the last sum. They need the GIL to free them, while the destructor of
    the group holds the GIL and waits for the threads (torch 2.7). A short sleep lets the threads finish first.
    """
    if torch.distributed.is_initialized():
        time.sleep(0.2)
        torch.distributed.destroy_process_group()


def _register(timeout: float, deadline: float) -> Any:
    """Registers this rank in the store of rank 0, waits until all ranks have registered, and returns the store."""
    me, address, port = this_process(), os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
    make_store: Any = torch.distributed.TCPStore  # pyright: ignore[reportPrivateImportUsage]
    if me.rank:
        _wait_for_port(address, port, deadline)
    store = _call_with_timeout(deadline - time.monotonic(), lambda: make_store(
        address, port, me.world_size, me.rank == 0, wait_for_workers=False, multi_tenant=True))
    number = store.add('meet/joined', 1)
    store.set(f'meet/{number}', json.dumps(me))
    if me.rank and number > me.world_size:
        raise UserError(f'{this_machine()}: all {me.world_size} ranks of WORLD_SIZE have already joined at '
                        f'{address}:{port}; is a node started twice, or does another run use this MASTER_PORT?')
    while not store.check([VERDICT]):  # short calls, so that Python can handle signals between them
        joined, verdict = [], ''
        is_late = time.monotonic() > deadline
        if me.rank == 0 or is_late:
            joined = [Process(*json.loads(store.get(f'meet/{i + 1}'))) for i in range(store.add('meet/joined', 0))]
            verdict = _judge(joined, me.world_size)
        if is_late and not verdict:
            verdict = (f'{len(joined)} of {me.world_size} ranks (WORLD_SIZE) joined at {address}:{port} within '
                       f'dist_timeout, {timeout:g} s: {_present_and_missing(joined, me)}; {NETWORK_ADVICE}')
        if verdict:
            store.compare_set(VERDICT, '', verdict)  # the first one counts
        time.sleep(0.1)
    verdict = store.get(VERDICT).decode()
    if verdict != 'ok':
        if me.rank == 0:
            time.sleep(2)  # the store ends with this process: let the others read the verdict
        raise UserError(f'{this_machine()}: {verdict}')
    return store


def _judge(joined: list[Process], world_size: int) -> str:
    """Describes what is wrong with the ranks that have joined; 'ok' if all have joined, '' if some are missing."""
    errors = find_differences({process: {'WORLD_SIZE': str(process.world_size),
                                         'LOCAL_WORLD_SIZE': str(process.local_world_size)} for process in joined})
    ranks = [process.rank for process in joined]
    if duplicates := [rank for rank in ranks if ranks.count(rank) > 1]:  # the first one of a node is enough
        same_rank = [process for process in joined if process.rank == min(duplicates)]
        where = ', '.join(f'{process.node} ({process.host})' for process in same_rank)
        errors.append(f'{len(same_rank)} processes have RANK {min(duplicates)}, on NODE_RANK {where}')
    if errors:
        return '; '.join([*errors, SAME_WORLD_ADVICE])
    return 'ok' if len(joined) >= world_size else ''


def _present_and_missing(joined: list[Process], me: Process) -> str:
    """Names the nodes and ranks that have joined, and the nodes of ranks that have not."""
    missing = sorted({rank // me.local_world_size for rank in set(range(me.world_size)) - {p.rank for p in joined}})
    return (f'{describe_ranks(joined, joined)}; missing are ranks of node {", ".join(map(str, missing[:8]))}'
            f'{" and more" * (len(missing) > 8)}')


def _wait_for_port(address: str, port: int, deadline: float) -> None:
    """Waits until a program listens at the port; torch would not say why nothing answers."""
    reason = ''
    while (seconds_left := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection((address, port), timeout=min(seconds_left, 5)).close()
            return
        except OSError as e:
            reason = str(e)
            time.sleep(min(seconds_left, 0.5))
    raise RuntimeError(f'node 0 does not answer: {reason}')


def _call_with_timeout(seconds: float, call: Callable[[], Any]) -> Any:
    """Returns what `call` returns; raises RuntimeError after so many seconds.

    torch's own time-outs are not reliable, and Python handles no signals during torch's calls.
    """
    try:
        return run_in_background(call).result(max(seconds, 0))
    except NoAnswer:
        raise RuntimeError('no answer in time') from None


def _choose_network() -> None:
    """Sets gloo's network to the one that leads to node 0: by default gloo takes that of the host's name."""
    family, kind, _, _, address = socket.getaddrinfo(os.environ['MASTER_ADDR'], 9, type=socket.SOCK_DGRAM)[0]
    try:
        with socket.socket(family, kind) as s:
            s.connect(address)  # sends nothing, but asks the kernel for the route
            own_address = s.getsockname()[0]
    except OSError:
        return
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address.split('%')[0] == own_address for a in addresses):
            os.environ.setdefault('GLOO_SOCKET_IFNAME', name)
            return

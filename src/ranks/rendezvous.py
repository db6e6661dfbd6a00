"""How the ranks of a run meet, within the time that was set, and part."""

import json
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import TimeoutError as NoAnswer
from typing import Any

import psutil
import torch
from composer.utils import dist, get_device

from src.common.errors import UserError
from src.common.workers import run_in_background
from src.ranks.agreement import CHECK, describe_ranks, explain_network_errors, find_differences
from src.ranks.environment import Process, this_machine, this_process

VERDICT = 'meet/verdict'  # in the store: 'ok', or why the ranks do not go together
ONE_WORLD = ('start every node with its own NODE_RANK, and all with the same composer -n, WORLD_SIZE, MASTER_ADDR and '
             'MASTER_PORT')


def initialize(timeout: float) -> None:
    """Lets all ranks meet, and makes the process group; does nothing when that is done.

    Before torch connects them, all ranks register in the store of rank 0, which sees who is missing, twice there or set
    up otherwise. torch alone, in 2.7, names nobody, and waits longer than asked: up to twice the time-out for a node 0
    that does not answer, for ever for another program at its port, and five times for gloo's connections.

    `timeout` is `dist_timeout`, in seconds, and also that of every later collective. Raises UserError where the ranks
    did not meet within it, or not these ranks; where they meet and cannot connect (at most 5 seconds later); or where
    LOCAL_WORLD_SIZE is more than the node has GPUs.
    """
    if torch.distributed.is_initialized() or dist.get_world_size() == 1:
        dist.initialize_dist(get_device(None), timeout)
        return
    if torch.cuda.is_available() and dist.get_local_world_size() > torch.cuda.device_count():
        raise UserError(f'LOCAL_WORLD_SIZE: {dist.get_local_world_size()} processes on {this_machine()}, which has '
                        f'{torch.cuda.device_count()} GPUs; set composer -n to that')
    deadline = time.monotonic() + timeout
    with explain_network_errors(f'the ranks do not meet (dist_timeout: {timeout:g} s)'):
        # torchrun's agents have already met, and hold the store
        store = None if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True' else _meet(timeout, deadline)
    _choose_network()
    with explain_network_errors('the ranks have met, but cannot connect to each other '
                                f'(dist_timeout: {timeout:g} s)'):
        # `get_device` in both threads, because the current GPU is a thread's own
        _within(max(deadline - time.monotonic(), 5), lambda: dist.initialize_dist(get_device(None), timeout))
    get_device(None)
    del store  # held until here, so that the server on rank 0 is one and the same


def leave() -> None:
    """Ends the process group, if there is one.

    gloo's threads may still hold the tensors of the last sum, and need the GIL to free them, while the group's
    destructor keeps it and waits for the threads: ended at once, a process hangs now and then (torch 2.7). A moment of
    sleep lets them finish.
    """
    if torch.distributed.is_initialized():
        time.sleep(0.2)
        torch.distributed.destroy_process_group()


def _meet(timeout: float, deadline: float) -> Any:
    """Registers this rank with rank 0, waits until that has heard of all ranks, and returns the store."""
    me, address, port = this_process(), os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
    make: Any = torch.distributed.TCPStore  # pyright: ignore[reportPrivateImportUsage]
    if me.rank:
        _wait_for_port(address, port, deadline)
    store = _within(deadline - time.monotonic(), lambda: make(
        address, port, me.world_size, me.rank == 0, wait_for_workers=False, multi_tenant=True))
    number = store.add('meet/joined', 1)
    store.set(f'meet/{number}', json.dumps(me))
    if me.rank and number > me.world_size:
        raise UserError(f'{this_machine()}: all {me.world_size} ranks of WORLD_SIZE have already joined at '
                        f'{address}:{port}; is a node started twice, or does another run use this MASTER_PORT?')
    while not store.check([VERDICT]):  # short calls, so that signals are heard
        joined, verdict = [], ''
        late = time.monotonic() > deadline
        if me.rank == 0 or late:
            joined = [Process(*json.loads(store.get(f'meet/{i + 1}'))) for i in range(store.add('meet/joined', 0))]
            verdict = _verdict(joined, me.world_size)
        if late and not verdict:
            verdict = (f'{len(joined)} of {me.world_size} ranks (WORLD_SIZE) joined at {address}:{port} within '
                       f'dist_timeout, {timeout:g} s: {_present_and_missing(joined, me)}; {CHECK}')
        if verdict:
            store.compare_set(VERDICT, '', verdict)  # the first one counts
        time.sleep(0.1)
    verdict = store.get(VERDICT).decode()
    if verdict != 'ok':
        if me.rank == 0:
            time.sleep(2)  # the store ends with this process: let the others read the verdict
        raise UserError(f'{this_machine()}: {verdict}')
    return store


def _verdict(joined: list[Process], world_size: int) -> str:
    """What is wrong with the ranks that have joined; 'ok' once all are there, and empty until then."""
    errors = find_differences({process: {'WORLD_SIZE': str(process.world_size),
                                         'LOCAL_WORLD_SIZE': str(process.local_world_size)} for process in joined})
    ranks = [process.rank for process in joined]
    if twice := [rank for rank in ranks if ranks.count(rank) > 1]:  # of a node's ranks the first says enough
        twins = [process for process in joined if process.rank == min(twice)]
        where = ', '.join(f'{process.node} ({process.host})' for process in twins)
        errors.append(f'{len(twins)} processes have RANK {min(twice)}, on NODE_RANK {where}')
    if errors:
        return '; '.join([*errors, ONE_WORLD])
    return 'ok' if len(joined) >= world_size else ''


def _present_and_missing(joined: list[Process], me: Process) -> str:
    missing = sorted({rank // me.local_world_size for rank in set(range(me.world_size)) - {p.rank for p in joined}})
    return (f'{describe_ranks(joined, joined)}; missing are ranks of node {", ".join(map(str, missing[:8]))}'
            f'{" and more" * (len(missing) > 8)}')


def _wait_for_port(address: str, port: int, deadline: float) -> None:
    """Returns once something listens there; torch would not say why nothing answers."""
    reason = ''
    while (left := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection((address, port), timeout=min(left, 5)).close()
            return
        except OSError as e:
            reason = str(e)
            time.sleep(min(left, 0.5))
    raise RuntimeError(f'node 0 does not answer: {reason}')


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """What `call` returns or raises, or a RuntimeError: torch's time-outs do not hold, and its calls hear no signal."""
    try:
        return run_in_background(call).result(max(seconds, 0))
    except NoAnswer:
        raise RuntimeError('no answer in time') from None


def _choose_network() -> None:
    """Points gloo at the network that leads to node 0: its own choice is that of the host's name, maybe loopback."""
    family, kind, _, _, address = socket.getaddrinfo(os.environ['MASTER_ADDR'], 9, type=socket.SOCK_DGRAM)[0]
    try:
        with socket.socket(family, kind) as s:
            s.connect(address)  # sends nothing: asks the kernel for the route
            mine = s.getsockname()[0]
    except OSError:
        return
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address.split('%')[0] == mine for a in addresses):
            os.environ.setdefault('GLOO_SOCKET_IFNAME', name)
            return

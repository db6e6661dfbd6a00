"""How the ranks of a run meet, within the time that was set, and part."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Optional

from src.common.errors import UserError
from src.ranks.environment import CHECK, Rank, differences, explained, here, places


def initialize(timeout: float) -> None:
    """Lets all ranks meet, and makes the process group; does nothing when that is done.

    Before torch connects them, all ranks register in the store of rank 0, which sees who is missing, twice there or set up
    otherwise. torch alone, in 2.7, names nobody, and waits longer than asked: up to twice the time-out for a node 0 that does
    not answer, for ever for another program at its port, and five times for gloo's connections.

    Args:
        timeout: Seconds, `dist_timeout`; also that of every later collective.

    Raises:
        UserError: The ranks did not meet within `timeout`, or not these ranks; or they meet and cannot connect (at most 5
            seconds later). LOCAL_WORLD_SIZE is more than the node has GPUs.
    """
    import torch
    from composer.utils import dist, get_device

    if torch.distributed.is_initialized() or dist.get_world_size() == 1:
        dist.initialize_dist(get_device(None), timeout)
        return
    if torch.cuda.is_available() and dist.get_local_world_size() > torch.cuda.device_count():
        raise UserError(f'LOCAL_WORLD_SIZE: {dist.get_local_world_size()} processes on {here()}, which has '
                        f'{torch.cuda.device_count()} GPUs; set composer -n to that')
    deadline = time.monotonic() + timeout
    with explained(f'the ranks do not meet (dist_timeout: {timeout:g} s)'):
        # torchrun's agents have already met, and hold the store
        store = None if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True' else _meet(timeout, deadline)
    _choose_network()
    with explained(f'the ranks have met, but cannot connect to each other (dist_timeout: {timeout:g} s)'):
        # `get_device` in both threads, because the current GPU is a thread's own
        _within(max(deadline - time.monotonic(), 5), lambda: dist.initialize_dist(get_device(None), timeout))
    get_device(None)
    del store  # held until here, so that the server on rank 0 is one and the same


def leave() -> None:
    """Ends the process group, if there is one.

    gloo's threads may still hold the tensors of the last sum, and need the GIL to free them, while the group's destructor keeps
    it and waits for the threads: ended at once, a process hangs now and then (torch 2.7). A moment of sleep lets them finish.
    """
    import torch

    if torch.distributed.is_initialized():
        time.sleep(0.2)
        torch.distributed.destroy_process_group()


def _meet(timeout: float, deadline: float) -> Any:
    """Registers this rank with rank 0, and waits until that has heard of all ranks."""
    import torch.distributed

    make: Any = torch.distributed.TCPStore  # pyright: ignore[reportPrivateImportUsage]
    env, address, port = os.environ, os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
    rank, world = int(env['RANK']), int(env['WORLD_SIZE'])
    if rank:
        _wait_for_port(address, port, deadline)
    store = _within(deadline - time.monotonic(), lambda: make(address, port, world, rank == 0, wait_for_workers=False,
                                                              multi_tenant=True))
    mine = Rank(rank, int(env['NODE_RANK']), socket.gethostname(), {k: env[k] for k in ('WORLD_SIZE', 'LOCAL_WORLD_SIZE')})
    number = store.add('meet/joined', 1)
    store.set(f'meet/{number}', json.dumps(mine))
    if rank and number > world:
        raise UserError(f'{here()}: all {world} ranks of WORLD_SIZE have already joined at {address}:{port}; is a node started '
                        'twice, or does another run use this MASTER_PORT?')
    ranks: list[Rank] = []
    while time.monotonic() < deadline and not store.check(['meet/verdict']):  # short calls, so that signals are heard
        if rank == 0:
            ranks = _joined(store, ranks)
            if (verdict := _verdict(ranks)) or len(ranks) >= world:
                store.compare_set('meet/verdict', '', verdict or 'ok')
                break
        time.sleep(0.1)
    else:
        ranks = _joined(store, ranks)
    if not store.check(['meet/verdict']):
        arrived = {r.rank for r in ranks}
        absent = [str(n) for n in sorted({r // int(env['LOCAL_WORLD_SIZE']) for r in set(range(world)) - arrived})]
        store.compare_set('meet/verdict', '', f'{len(arrived)} of {world} ranks (WORLD_SIZE) joined at {address}:{port} within '
                          f'dist_timeout, {timeout:g} s: {places(ranks, sorted(ranks))}; missing are ranks of node '
                          f'{", ".join(absent[:8])}{" and more" * (len(absent) > 8)}; {CHECK}')
    verdict = store.get('meet/verdict').decode()
    read = store.add('meet/read', 1)
    if verdict != 'ok':
        until = time.monotonic() + 5  # the store ends with rank 0: let the others read the verdict
        with suppress(RuntimeError):  # this rank 0 may be a second one, and the store on the first
            while rank == 0 and read < len(_joined(store, ranks)) and time.monotonic() < until:
                time.sleep(0.1)
                read = store.add('meet/read', 0)
        raise UserError(f'{here()}: {verdict}')
    return store


def _joined(store: Any, known: list[Rank]) -> list[Rank]:
    return known + [Rank(*json.loads(store.get(f'meet/{i + 1}'))) for i in range(len(known), store.add('meet/joined', 0))]


def _verdict(ranks: list[Rank]) -> str:
    """What is wrong with the ranks that have joined; empty when nothing is."""
    errors = differences(ranks)
    for rank in sorted({r.rank for r in ranks}):
        twins = [r for r in ranks if r.rank == rank]
        if len(twins) > 1:
            where = ', '.join(f'{r.node} ({r.host})' for r in twins)
            errors.append(f'{len(twins)} processes have RANK {rank}, on NODE_RANK {where}')
            break  # the other ranks of these nodes say no more
    return '; '.join([*errors, 'start every node with its own NODE_RANK, and all with the same composer -n, WORLD_SIZE, '
                      'MASTER_ADDR and MASTER_PORT']) if errors else ''


def _wait_for_port(address: str, port: int, deadline: float) -> None:
    """Returns once something listens there; torch would not say why nothing answers."""
    reason = ''
    while (left := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection((address, port), timeout=min(left, 5)).close()
            return
        except OSError as e:
            reason = str(e)
            time.sleep(min(0.5, max(deadline - time.monotonic(), 0)))
    raise RuntimeError(f'node 0 does not answer: {reason}')


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """What `call` returns or raises, or a RuntimeError: torch's own time-outs do not hold, and its calls hear no signal."""
    out: list[tuple[Any, Optional[BaseException]]] = []

    def run() -> None:
        try:
            out.append((call(), None))
        except BaseException as e:  # raised again below
            out.append((None, e))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(max(seconds, 0))
    if not out:
        raise RuntimeError('no answer in time')
    value, error = out[0]
    if error is not None:
        raise error
    return value


def _choose_network() -> None:
    """Points gloo at the network that leads to node 0: its own choice is the one of the host's name, which may be loopback."""
    if 'GLOO_SOCKET_IFNAME' in os.environ:
        return
    import psutil

    family, kind, _, _, address = socket.getaddrinfo(os.environ['MASTER_ADDR'], 9, type=socket.SOCK_DGRAM)[0]
    try:
        with socket.socket(family, kind) as s:
            s.connect(address)  # sends nothing: asks the kernel for the route
            mine = s.getsockname()[0]
    except OSError:
        return
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address.split('%')[0] == mine for a in addresses):
            os.environ['GLOO_SOCKET_IFNAME'] = name
            break

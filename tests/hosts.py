"""Nodes for tests: processes with a /dev/shm each, or hosts in network namespaces, all on one machine."""

import json
import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Optional

import pytest
from launch import ROOT, SCRIPTS, Popen, clean_env
from warm import HOST

# Two real nodes do not share /dev/shm, so each gets its own in a mount namespace.
NODE = ['unshare', '--mount', '--map-root-user', 'sh', '-c', 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', 'sh']

sessions: set[int] = set()  # of the processes that we start, to find the orphans of a launcher


def need_nodes() -> None:
    """Skips the test if this user may not run `NODE`."""
    if subprocess.run([*NODE, 'true'], capture_output=True).returncode:
        pytest.skip('needs the right to make a mount namespace: two nodes have a /dev/shm each')


def start(command: Sequence[str], host: Optional[dict[str, Any]] = None, **env: str) -> subprocess.Popen:
    """Starts `command` in the repository's root as the leader of a process group, with stdout and stderr in one pipe.

    `host` has arguments of `warm.enter_host`; {} is a node with a /dev/shm of its own.
    """
    on_host = {} if host is None else {HOST: json.dumps(host)}
    process = Popen(command, cwd=ROOT, env=clean_env(**on_host, **env), text=True, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT, start_new_session=True)
    sessions.add(process.pid)
    return process


class Host:
    """A network namespace with an address and a host name, in which commands can run."""

    def __init__(self, name: str, namespace: str, address: str):
        self.name, self.namespace, self.address = name, namespace, address

    def start(self, command: Sequence[str], **env: str) -> subprocess.Popen:
        """Starts `command` on this host, like the function `start`."""
        return start(command, {'name': self.name, 'network': self.namespace}, **env)

    def composer(self, *arguments: str, **env: str) -> subprocess.Popen:
        return self.start([str(SCRIPTS / 'composer'), *arguments], **env)


@contextmanager
def hosts() -> Iterator[list[Host]]:
    """host-a and host-b, connected by one veth pair and to nothing else; removed at the end of the test."""
    if os.geteuid() or not shutil.which('ip'):
        pytest.skip('two hosts in network namespaces need root and ip')
    tag = uuid.uuid4().hex[:8]
    two = [Host(f'host-{x}', f'kit-{tag}-{x}', f'10.231.7.{n}') for n, x in ((1, 'a'), (2, 'b'))]

    def ip(*arguments: str) -> None:
        subprocess.run(['ip', *arguments], check=True, capture_output=True, text=True)

    with ExitStack() as undo:
        try:
            for host in two:
                ip('netns', 'add', host.namespace)
                undo.callback(_remove, host.namespace)
            a, b = (host.namespace for host in two)
            ip('-n', a, 'link', 'add', 'wire0', 'type', 'veth', 'peer', 'name', 'wire0', 'netns', b)
            for host in two:
                ip('-n', host.namespace, 'addr', 'add', f'{host.address}/24', 'dev', 'wire0')
                for device in ('lo', 'wire0'):
                    ip('-n', host.namespace, 'link', 'set', device, 'up')
        except subprocess.CalledProcessError as e:
            pytest.skip(f'two hosts in network namespaces need root and ip: {e.stderr.strip()}')
        yield two


def kill_all() -> None:
    """Kills all processes that `start` started here and that still run."""
    for folder in Path('/proc').glob('[0-9]*'):
        with suppress(OSError):  # the process has just ended
            if os.getsid(int(folder.name)) in sessions:
                os.kill(int(folder.name), signal.SIGKILL)


def _remove(namespace: str) -> None:
    """Removes a namespace and its veth pair. A namespace stays as long as a process is in it."""
    kill_all()
    subprocess.run(['ip', 'netns', 'del', namespace], check=True)


def outputs(nodes: Sequence[subprocess.Popen], timeout: float = 240) -> list[str]:
    """Returns what each process printed. Kills all of them if one does not end in time."""
    try:
        return [node.communicate(timeout=timeout)[0] for node in nodes]
    except subprocess.TimeoutExpired:
        kill_all()
        raise AssertionError('\n'.join(node.communicate()[0] for node in nodes)) from None

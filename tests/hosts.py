"""Nodes for tests: processes of one machine, each with its own /dev/shm, or hosts of their own in network namespaces."""

import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from launch import ROOT, SCRIPTS, clean_env

# Two nodes do not share /dev/shm: each gets one of its own, in a mount namespace.
NODE = ['unshare', '--mount', '--map-root-user', 'sh', '-c', 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', 'sh']

MARK = f'test-{uuid.uuid4()}'  # in the environment of all that is started here: a launcher's orphans have no other trace


def need_nodes() -> None:
    """Skips the test where `NODE` is not allowed."""
    if subprocess.run([*NODE, 'true'], capture_output=True).returncode:
        pytest.skip('needs the right to make a mount namespace: two nodes have a /dev/shm each')


def start(command: Sequence[str], **env: str) -> subprocess.Popen:
    """Starts `command` in the repository's root, as the leader of a process group; output and errors in one pipe."""
    return subprocess.Popen(command, cwd=ROOT, env=clean_env(TEST_NODE=MARK, **env), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True)


class Host:
    """A network namespace with an address, and a way to run a command there under a host name of its own."""

    def __init__(self, name: str, namespace: str, address: str):
        self.name, self.namespace, self.address = name, namespace, address

    def start(self, command: Sequence[str], **env: str) -> subprocess.Popen:
        """As the function `start`, on this host."""
        own = ['ip', 'netns', 'exec', self.namespace, 'unshare', '--mount', '--uts', 'sh', '-c',
               'hostname "$0" && mount -t tmpfs tmpfs /dev/shm && exec "$@"', self.name]
        return start([*own, *command], **env)

    def composer(self, *arguments: str, **env: str) -> subprocess.Popen:
        return self.start([str(SCRIPTS / 'composer'), *arguments], **env)


@contextmanager
def hosts() -> Iterator[list[Host]]:
    """host-a and host-b, which reach each other over one wire (a veth pair) and nothing else; gone at the end."""
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
    """Ends everything that `start` began here and that still runs."""
    for environ in Path('/proc').glob('[0-9]*/environ'):
        with suppress(OSError):  # it has just ended
            if f'TEST_NODE={MARK}'.encode() in environ.read_bytes().split(b'\0'):
                os.kill(int(environ.parent.name), signal.SIGKILL)


def _remove(namespace: str) -> None:
    """Removes a namespace, which outlives its name as long as a process is in it; and with it the wire."""
    kill_all()
    subprocess.run(['ip', 'netns', 'del', namespace], check=True)


def outputs(nodes: Sequence[subprocess.Popen], timeout: float = 240) -> list[str]:
    """What each printed; all that runs is ended when one does not end in time."""
    try:
        return [node.communicate(timeout=timeout)[0] for node in nodes]
    except subprocess.TimeoutExpired:
        kill_all()
        raise AssertionError('\n'.join(node.communicate()[0] for node in nodes)) from None

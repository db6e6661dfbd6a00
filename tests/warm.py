"""Starts programs of the kit without the seconds that Python needs to import torch, Composer and streaming.

A server imports the libraries once. For each program it forks a process, which reads the script anew and runs it as
`python SCRIPT` would: with its own arguments, environment, folder, pipes, exit code, and no module of the kit loaded.
The processes are children of the test, so everything in `subprocess.Popen` works. In a Composer launcher that starts so,
the ranks start the same way.

Differences to a new process: the command line in /proc is that of the server, hashes of strings do not change between
processes, and all libraries are imported, with Composer's handler of SIGTERM unless `DEFAULT_SIGTERM` is set. Tests that depend
on these take `subprocess`.
"""

import atexit
import ctypes
import gc
import inspect
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, Optional

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = Path(sys.executable).parent
READ_AT_IMPORT = ('HF_', 'HUGGINGFACE_', 'LD_', 'MPL', 'NCCL_', 'OMP_', 'PYTHON', 'TORCH', 'TQDM_', 'TRANSFORMERS_')
PR_SET_CHILD_SUBREAPER = 36
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWUSER, CLONE_NEWNET = 0x20000, 0x4000000, 0x10000000, 0x40000000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
MAX_FDS = 256
REAL_POPEN = subprocess.Popen
HOST = 'TEST_HOST'  # in the environment of a program: the JSON of a host that the program runs on, see `enter_host`
DEFAULT_SIGTERM = 'TEST_DEFAULT_SIGTERM'  # in the environment of a program that does without Composer's handler of SIGTERM


def clean_env(**extra: str) -> dict[str, str]:
    """The environment without a launcher's variables, with one thread for each rank, no GPU and no hub."""
    env = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'NODE_RANK',
                                                           'MASTER_ADDR', 'MASTER_PORT', 'COMPOSER_RUN_NAME', 'RUN_NAME')}
    return env | {'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'WANDB_MODE': 'offline',
                  'TORCH_WARM_POOL': '0',  # else torchao starts inductor's compile workers in each process
                  'PATH': f'{SCRIPTS}{os.pathsep}{env["PATH"]}'} | extra


def read_at_import(env: dict[str, str]) -> dict[str, str]:
    """The variables that a library reads when it is imported; a program with others cannot start warm."""
    return {name: value for name, value in env.items() if name.startswith(READ_AT_IMPORT) and name != 'PYTHONPATH'}


def fork_argv(options: dict[str, Any]) -> Optional[list[str]]:
    """The script and its arguments, if a fork can run it: `python [-u] SCRIPT`, `python -c CODE`, Composer's launcher."""
    if isinstance(options['args'], (str, bytes)) or any(options[name] for name in ('preexec_fn', 'shell', 'pass_fds')):
        return None
    program, *rest = map(str, options['args'])
    if program == str(SCRIPTS / 'composer'):
        return [program, *rest]
    rest = rest[1:] if rest[:1] == ['-u'] else rest
    is_forkable = program == sys.executable and (rest[:1] == ['-c'] or rest[:1] and rest[0].endswith('.py'))
    return rest if is_forkable else None


class Popen(subprocess.Popen):
    """`subprocess.Popen`, which forks a server that has imported the libraries where it can."""

    def _execute_child(self, *args: Any) -> None:
        options = inspect.signature(REAL_POPEN._execute_child).bind(self, *args).arguments  # pyright: ignore
        env, argv = dict(os.environ if options['env'] is None else options['env']), fork_argv(options)
        if argv is None or not self._can_fork(env):
            assert HOST not in env, 'only a fork enters a host'
            return super()._execute_child(*args)  # pyright: ignore
        fds = [number if fd == -1 else fd for number, fd in
               enumerate((options['p2cread'], options['c2pwrite'], options['errwrite']))]
        if '-u' in options['args'][1:2]:
            env['PYTHONUNBUFFERED'] = '1'
        self.pid = self._fork({'argv': argv, 'env': env, 'cwd': str(options['cwd'] or os.getcwd()),
                               'session': bool(options['start_new_session'])}, fds)
        self._child_created = True
        self._close_pipe_fds(*(options[name] for name in (  # pyright: ignore
            'p2cread', 'p2cwrite', 'c2pread', 'c2pwrite', 'errread', 'errwrite')))
        return None

    def _can_fork(self, env: dict[str, str]) -> bool:
        uses_gpu = env.get('CUDA_VISIBLE_DEVICES')  # the server may have asked CUDA for GPUs, and then no fork can use one
        return sys.platform == 'linux' and not uses_gpu and read_at_import(env) == read_at_import(clean_env())

    def _fork(self, request: dict[str, Any], fds: list[int]) -> int:
        return server.fork(request, fds)


def run(command: Any, timeout: float = 300, check: bool = False, **options: Any) -> subprocess.CompletedProcess:
    """`subprocess.run`, with the output captured as text unless the options say otherwise."""
    options.pop('capture_output', None)
    options = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True} | options
    with Popen(command, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.terminate()  # a launcher then stops its ranks: by SIGTERM, and after 30 seconds by SIGKILL
            try:
                process.communicate(timeout=40)
            except subprocess.TimeoutExpired:
                pass
            finally:
                process.kill()
            raise
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


class Server:
    """The process that is forked; it starts with the first program and ends with this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: Optional[socket.socket] = None
        self._owner = 0

    def fork(self, request: dict[str, Any], fds: list[int]) -> int:
        """Forks the server and returns the pid of the new process, which is a child of this one."""
        with self._lock:
            if self._socket is None or self._owner != os.getpid():
                self._start()
            assert self._socket is not None
            message = json.dumps(request).encode()
            # When the process between the server and the new one ends, the nearest subreaper becomes the parent.
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
            try:
                socket.send_fds(self._socket, [len(message).to_bytes(8, 'big')], fds)
                self._socket.sendall(message)
                return int.from_bytes(_receive(self._socket, 8), 'big')
            finally:
                ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0)

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._owner = os.getpid()
        with theirs:
            subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], cwd=ROOT,
                             env=clean_env())


server = Server()


# ---------------------------------------------------------------- in the server
def _receive(connection: socket.socket, size: int) -> bytes:
    data = b''
    while len(data) < size:
        if not (part := connection.recv(size - len(data))):
            raise EOFError
        data += part
    return data


def serve(connection: socket.socket) -> None:
    """Forks a process for each request, until the test process closes the connection."""
    while True:
        head, fds, _, _ = socket.recv_fds(connection, 8, 3)
        if not head:
            return
        request = json.loads(_receive(connection, int.from_bytes(head, 'big')))
        read, write = os.pipe()
        if (middle := os.fork()) == 0:
            middle = os.getpid()
            if pid := os.fork():
                os.write(write, pid.to_bytes(8, 'big'))
                os._exit(0)
            while os.getppid() == middle:  # the test process is not the parent yet
                os.sched_yield()
            become(request, fds)
        for fd in (*fds, write):
            os.close(fd)
        os.waitpid(middle, 0)
        connection.sendall(os.read(read, 8))
        os.close(read)


def become(request: dict[str, Any], fds: list[int]) -> NoReturn:
    """Turns this process, a fork, into one that runs a script, and ends it as Python does."""
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
    os.closerange(3, MAX_FDS)
    if request['session']:
        os.setsid()
    os.chdir(request['cwd'])
    if HOST in request['env']:
        enter_host(**json.loads(request['env'].pop(HOST)))
    os.environ.clear()
    os.environ.update(request['env'])
    for name, fd in (('stdin', 0), ('stdout', 1), ('stderr', 2)):
        mode, at_once = 'r' if fd == 0 else 'w', fd == 2 or 'PYTHONUNBUFFERED' in os.environ
        setattr(sys, name, open(fd, mode, closefd=False, buffering=1 if at_once else -1))  # noqa: SIM115
    random.seed()
    tempfile.tempdir = None  # else the folder of the server
    if os.environ.pop(DEFAULT_SIGTERM, None):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit an ignored SIGINT
    sys.argv = request['argv']
    code = sys.argv.pop(1) if sys.argv[0] == '-c' else None
    added = [folder for folder in os.environ.get('PYTHONPATH', '').split(os.pathsep) if folder]
    sys.path[:1] = ['' if code else str(Path(sys.argv[0]).absolute().parent), *added]
    subprocess.Popen = LauncherPopen if Path(sys.argv[0]).name == 'composer' else REAL_POPEN  # pyright: ignore
    status = 0
    try:
        if code is None:
            runpy.run_path(sys.argv[0], run_name='__main__')
        else:
            sys.modules['__main__'] = module = ModuleType('__main__')
            exec(compile(code, '<string>', 'exec'), vars(module))
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:  # KeyboardInterrupt too
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()  # pyright: ignore
    atexit._run_exitfuncs()
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(status)


def enter_host(name: str = '', network: str = '', disks: Sequence[str] = ('/dev/shm',)) -> None:
    """Gives this process empty disks of its own, and a host name and the network of a namespace, if they are named."""
    libc, uid, gid = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()

    def call(function: str, *args: Any) -> None:
        if getattr(libc, function)(*args):
            raise OSError(ctypes.get_errno(), f'{function}{args}')

    if network:
        call('setns', os.open(f'/run/netns/{network}', os.O_RDONLY), CLONE_NEWNET)
    call('unshare', CLONE_NEWNS | (CLONE_NEWUTS if name else 0) | (CLONE_NEWUSER if uid else 0))
    if uid:
        Path('/proc/self/setgroups').write_text('deny')
        Path('/proc/self/uid_map').write_text(f'0 {uid} 1')
        Path('/proc/self/gid_map').write_text(f'0 {gid} 1')
    if name:
        socket.sethostname(name)
    call('mount', b'none', b'/', None, MS_REC | MS_PRIVATE, None)
    for disk in disks:
        call('mount', b'tmpfs', disk.encode(), b'tmpfs', 0, None)


class LauncherPopen(Popen):
    """In a launcher: starts each rank as a fork of the launcher, which has imported the libraries."""

    def _can_fork(self, env: dict[str, str]) -> bool:
        return True

    def _fork(self, request: dict[str, Any], fds: list[int]) -> int:
        sys.stdout.flush()
        if pid := os.fork():
            return pid
        become(request, fds)


if __name__ == '__main__':
    import composer.algorithms  # noqa: F401
    import datasets  # noqa: F401
    import streaming  # noqa: F401
    import transformers  # noqa: F401
    from composer.utils.collect_env import get_cpu_model

    get_cpu_model()  # Composer keeps it; a process of its own asks the CPU for a second
    sys.path.insert(0, str(ROOT))
    import main  # noqa: F401  # for what else it imports
    for name in [name for name in sys.modules if name.partition('.')[0] in ('main', 'src')]:
        del sys.modules[name]
    sys.path.pop(0)
    gc.collect()
    gc.freeze()  # else each collection in a fork looks at all libraries, and copies their memory
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # at once, with no clean-up of what only its forks have used

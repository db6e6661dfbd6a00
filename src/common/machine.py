"""Checks and prepares the machine for a run: user and home, folders, compilers, shared memory.

This module imports nothing slow: programs call it before they import torch and Composer.
"""

import faulthandler
import getpass
import multiprocessing.util
import os
import re
import shutil
import sys
import sysconfig
import tempfile
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Optional

from src.common.errors import UserError, exception_chain

SHARED_MEMORY = Path('/dev/shm')
BOOT_ID = Path('/proc/sys/kernel/random/boot_id')  # changes with each boot; some sandboxes hide the file
LOW = 32 << 20  # bytes: with less free shared memory, this is the likely cause of a crash
# The kernel allows 107 bytes for the path of a socket, and multiprocessing adds a folder and a file.
MAX_SOCKET_FOLDER = 107 - len('/pymp-xxxxxxxx/listener-xxxxxxxx')
SOCKETS = '/tmp'  # a folder with a path that is short enough for sockets
ENLARGE = ('start the container with docker run --shm-size=16g or --ipc=host (Kubernetes: mount an emptyDir of medium '
           f'Memory at {SHARED_MEMORY}), or remove what other programs left there (ls -l {SHARED_MEMORY})')


def prepare_environment() -> None:
    """Sets environment variables that libraries read when they are imported.

    USER and HOME are set if the system has none, as in `docker run --user 12345`: without a name torch.compile raises
    a KeyError, and without a home the import of matplotlib raises a RuntimeError. TORCH_WARM_POOL is set to 0 if
    shared memory is full: torch would start processes for later compilation, and they would print a traceback.
    fastokens gets no threads of its own: each worker process uses one core, and threads would not survive a fork.
    """
    os.environ['FASTOKENS_BPE_THREADS'] = '1'
    if low_shared_memory_hint():
        os.environ.setdefault('TORCH_WARM_POOL', '0')
    os.environ.setdefault('AWS_MAX_ATTEMPTS', '10')  # boto3's default of 3 is too few for a run of weeks
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on
        os.environ['USER'] = f'user-{os.getuid()}'
    if os.path.expanduser('~') == '~':
        home = Path(tempfile.gettempdir(), f'home-of-user-{os.getuid()}')
        home.mkdir(mode=0o700, exist_ok=True)
        os.environ['HOME'] = str(home)


class SkipTorchao(MetaPathFinder):
    """Keeps transformers from importing torchao, where that is installed: Composer's algorithms import transformers.

    torchao imports half of torch's compiler, which takes seconds. The kit imports torchao itself where FP8 needs it.
    For transformers torchao is then missing: a Hugging Face model whose weights torchao has quantised does not load.
    """

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == 'transformers.quantizers.quantizer_torchao':
            vars(sys.modules['transformers.utils.import_utils'])['_torchao_available'] = False


def set_up_output() -> None:
    """Lets a program print any text, and print a traceback when a signal such as SIGBUS ends it.

    A character that the terminal's encoding lacks is printed as an escape, such as `\\u20ac`. Otherwise `print` would
    raise a UnicodeEncodeError under a locale that is not UTF-8, and for file names that are not UTF-8.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors='backslashreplace')  # pyright: ignore[reportAttributeAccessIssue]
    if sys.stderr:
        faulthandler.enable()


def shorten_socket_paths() -> None:
    """Gives multiprocessing a folder with a short path for its sockets, if the path of TMPDIR is too long.

    Loader workers send batches through such sockets. Without a socket the run would wait for its first batch for ever.
    Raises UserError if TMPDIR is too long and `SOCKETS` cannot be written.
    """
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > MAX_SOCKET_FOLDER:
        tempfile.tempdir = SOCKETS
        try:
            multiprocessing.util.get_temp_dir()  # this process and its workers keep using it; it is removed at the end
        except OSError as e:
            raise UserError(f'TMPDIR: {folder!r} has {len(os.fsencode(folder))} bytes, but the sockets of loader '
                            f'workers allow only {MAX_SOCKET_FOLDER}; {SOCKETS} cannot be used instead ({e.strerror}). '
                            'Set TMPDIR to a folder with a shorter path') from e
        finally:
            tempfile.tempdir = folder


def compiler_errors(has_gpu: bool) -> list[str]:
    """Lists what `torch.compile` needs and this machine lacks: a C compiler for a GPU, C++ for a CPU, Python.h."""
    variable, language, names = ('CC', 'C', ('gcc', 'clang')) if has_gpu else ('CXX', 'C++', ('c++', 'g++', 'clang++'))
    out, device = [], 'a GPU' if has_gpu else 'a CPU'
    if not any(shutil.which(name) for name in (os.environ.get(variable) or names[0], *names)):
        out.append(f'compile_config: torch.compile needs a {language} compiler on {device}, and there is no '
                   f'{" or ".join(names)}; install one, set the variable {variable}, or set compile_config=null')
    header = Path(sysconfig.get_path('include'), 'Python.h')
    if not header.is_file():
        package = f'python{sys.version_info.major}.{sys.version_info.minor}-dev'
        out.append(f'compile_config: torch.compile needs the headers of Python on {device}, and there is no {header}; '
                   f'install them (Debian and Ubuntu: apt-get install {package}), or set compile_config=null')
    return out


def find_unwritable_folder(path: str) -> Optional[str]:
    """Returns None if `path`, which may not exist yet, can be written; else the existing folder that prevents it."""
    existing = next(p for p in (Path(path), *Path(path).absolute().parents) if os.path.exists(p))
    return None if os.path.isdir(existing) and os.access(existing, os.W_OK) else str(existing)


def free_shared_memory() -> Optional[int]:
    """Returns the free bytes of /dev/shm; None without that folder, or without a limit (its size is then 0)."""
    if not SHARED_MEMORY.is_dir():
        return None
    total, _, free = shutil.disk_usage(SHARED_MEMORY)
    return free if total else None


def megabytes(n: int) -> str:
    return f'{n / 1e6:,.1f} MB' if n >= 1e5 else f'{n:,} bytes'


def check_shared_memory(need: int, what: str, otherwise: str = '') -> None:
    """Raises UserError if fewer than `need` bytes of shared memory are free: SIGBUS would kill a process later.

    The message says `what` needs the bytes, and ends with `otherwise`, another thing that the user can do.
    """
    free = free_shared_memory()
    if free is not None and free < need:
        raise UserError(f'{SHARED_MEMORY} (shared memory) has {megabytes(free)} free, and {what} take '
                        f'{megabytes(need)} there; {ENLARGE}{otherwise}')


def low_shared_memory_hint() -> str:
    """Returns the end of a message about a crash: shared memory is full, and what to do; '' if it is not full."""
    free = free_shared_memory()
    if free is None or free >= LOW:
        return ''
    return f'; {SHARED_MEMORY} (shared memory) is full, {megabytes(free)} are free: {ENLARGE}'


# Patterns of torch's messages about a lost loader worker, and the advice for the loader of `{setting}`.
LOST_WORKER_ADVICE = {
    r'^\[Errno 28\]|Bus error|/torch_.*No space left':
        f'its workers found no room in {SHARED_MEMORY} (shared memory), through which they send batches; '
        f'{ENLARGE}; or set {{setting}}.num_workers=0',
    'killed by signal: Killed':
        'a loader worker was killed (SIGKILL), most likely by the system because memory ran out; set a smaller '
        '{setting}.num_workers, or give the run more memory',
    'Too many open files|ancdata':  # workers send batches as file descriptors
        'the process has reached its limit of open files; raise the limit (ulimit -n 65536), or set a smaller '
        '{setting}.num_workers or prefetch_factor',
}


def explain_lost_worker(error: Exception, setting: str) -> Optional[str]:
    """Explains an error of torch about a lost loader worker, with advice; None for other errors.

    `error` comes from the rank's DataLoader; `setting` is `train_loader` or `eval_loader`.
    """
    text = ' '.join(map(str, exception_chain(error)))
    for pattern, advice in LOST_WORKER_ADVICE.items():
        if re.search(pattern, text):
            return f'{setting}: {advice.format(setting=setting)}'
    if 'exited unexpectedly' in text and (low := low_shared_memory_hint()):
        return f'{setting}: a loader worker has ended{low}; or set {setting}.num_workers=0'
    return None

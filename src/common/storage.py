"""Folders on a disk and prefixes in an object store, with the same operations.

This module imports nothing slow before a store is opened: the conversion imports it to read its command line.
"""

import os
import re
import shutil
import socket
import tempfile
import uuid
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, Union

import psutil

from src.common.machine import BOOT_ID

HOST = socket.gethostname()  # followed by PID namespace and boot id, because machines may share a host name
with suppress(OSError):
    HOST += f'+{os.stat("/proc/self/ns/pid").st_ino}'
    HOST += f'+{BOOT_ID.read_text("utf-8")[:8]}'
OWNED = re.compile(r'\.part(ial)?-(?P<host>.*)-(?P<pid>\d+)-[0-9a-f]{8}')


def owner_tag() -> str:
    """Returns a suffix for unfinished files and folders, after `.part-` or `.partial-`: it names this process."""
    return f'{HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}'


def is_leftover(name: str, any_owner: bool = False) -> bool:
    """Tells whether a name has the `owner_tag` of an ended process of this machine or, with `any_owner`, any tag."""
    owned = OWNED.search(name)
    return bool(owned) and (any_owner or owned['host'] == HOST and not psutil.pid_exists(int(owned['pid'])))


class AnyFolder:
    """Operations that folders on a disk and in an object store share."""

    root: Any  # the path or the URL
    remote = False  # True for an object store
    can_delete = False  # True if files can be deleted

    def __str__(self) -> str:
        return str(self.root)

    def uri(self, name: str) -> str:
        return os.path.join(self.root, name)

    def read(self, name: str) -> str:
        """Returns the text of a file. Raises FileNotFoundError if there is no such file."""
        return self.read_bytes(name).decode()

    def read_bytes(self, name: str) -> bytes:
        raise NotImplementedError

    @staticmethod
    def call_with_retries(call: Callable[[], Any], attempts: int = 3) -> Any:
        """Calls an object store, up to `attempts` times, and returns its answer."""
        from streaming.base.util import retry

        return retry(num_attempts=attempts)(call)()


class LocalFolder(AnyFolder):
    """A folder on a disk that all nodes share."""

    can_delete = True

    def __init__(self, root: Union[str, Path]):
        self.root = Path(root)

    def names(self) -> list[str]:
        """Lists the files of this folder and of its subfolders, as relative paths."""
        paths = [*self.root.glob('*'), *self.root.glob('*/*')]
        return [str(path.relative_to(self.root)) for path in paths if path.is_file()]

    def size(self, name: str) -> int:
        """Returns the bytes of a file; -1 if there is no such file."""
        path = self.root / name
        return path.stat().st_size if path.is_file() else -1

    def read_bytes(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def write(self, name: str, text: str) -> None:
        part = self.root / f'{name}.part'
        with part.open('w', encoding='utf-8') as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, self.root / name)

    def delete(self, names: Collection[str]) -> None:
        for name in names:
            (self.root / name).unlink(missing_ok=True)
        for folder in {(self.root / name).parent for name in names} - {self.root}:
            shutil.rmtree(folder, ignore_errors=True)


class RemoteFolder(AnyFolder):
    """A prefix in an object store, read and written through Composer's client."""

    remote = True

    def __init__(self, uri: str):
        from composer.utils import ObjectStore, S3ObjectStore, maybe_create_object_store_from_uri, parse_uri

        self.root = uri.rstrip('/')
        store = maybe_create_object_store_from_uri(uri)
        assert isinstance(store, ObjectStore)
        self.store, self.prefix = store, parse_uri(self.root)[2]
        self.can_delete = isinstance(store, S3ObjectStore)  # Composer's ObjectStore cannot delete; boto3's client can

    def key(self, name: str) -> str:
        return f'{self.prefix}/{name}' if self.prefix else name

    def names(self) -> list[str]:
        names = self.call_with_retries(lambda: self.store.list_objects(self.key('')))
        return [name[len(self.key('')):] for name in names]

    def size(self, name: str) -> int:
        def get_size() -> int:
            try:
                return self.store.get_object_size(self.key(name))
            except FileNotFoundError:
                return -1
        return self.call_with_retries(get_size)

    def read_bytes(self, name: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, 'file')
            self.call_with_retries(lambda: self.store.download_object(self.key(name), str(file), overwrite=True))
            return file.read_bytes()

    def write(self, name: str, text: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, 'file').write_text(text, 'utf-8')
            self.upload(name, Path(folder, 'file'))

    def upload(self, name: str, file: Path) -> None:
        self.call_with_retries(lambda: self.store.upload_object(self.key(name), str(file)))

    def delete(self, names: Collection[str]) -> None:
        store: Any = self.store
        for key in map(self.key, names):
            self.call_with_retries(lambda key=key: store.client.delete_object(Bucket=store.bucket, Key=key))


Folder = Union[LocalFolder, RemoteFolder]


def open_folder(path: str) -> Folder:
    return RemoteFolder(path) if '://' in path else LocalFolder(path)

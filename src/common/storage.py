"""Where checkpoints lie: a folder on a disk or a prefix in an object store, with the same few operations."""

import os
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Union

from composer.utils import ObjectStore, S3ObjectStore, parse_uri, retry
from composer.utils import maybe_create_object_store_from_uri as object_store


class LocalFolder:
    """A folder on a disk that all nodes share."""

    deletes = True

    def __init__(self, root: Union[str, Path]):
        self.root = Path(root)

    def __str__(self) -> str:
        return str(self.root)

    def uri(self, name: str) -> str:
        return str(self.root / name)

    def names(self) -> list[str]:
        """Files, and those of the folders in it, relative to it."""
        paths = [*self.root.glob('*'), *self.root.glob('*/*')]
        return [str(path.relative_to(self.root)) for path in paths if path.is_file()]

    def size(self, name: str) -> int:
        """Bytes; -1 where there is no such file."""
        path = self.root / name
        return path.stat().st_size if path.is_file() else -1

    def read(self, name: str) -> str:
        return (self.root / name).read_text('utf-8')

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


class RemoteFolder:
    """A prefix in an object store, through Composer's client for it."""

    def __init__(self, uri: str):
        self.root = uri.rstrip('/')
        store = object_store(uri)
        assert isinstance(store, ObjectStore)
        self.store, self.prefix = store, parse_uri(self.root)[2]
        self.deletes = isinstance(store, S3ObjectStore)  # no ObjectStore of Composer's can: here its client does

    def __str__(self) -> str:
        return self.root

    def uri(self, name: str) -> str:
        return f'{self.root}/{name}'

    def key(self, name: str) -> str:
        return f'{self.prefix}/{name}' if self.prefix else name

    @retry(num_attempts=3)
    def names(self) -> list[str]:
        skip = len(self.key(''))
        return [name[skip:] for name in self.store.list_objects(self.key(''))]

    @retry(num_attempts=3)
    def size(self, name: str) -> int:
        try:
            return self.store.get_object_size(self.key(name))
        except FileNotFoundError:
            return -1

    @retry(num_attempts=3)
    def read(self, name: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            self.store.download_object(self.key(name), os.path.join(folder, 'file'))
            return Path(folder, 'file').read_text('utf-8')

    def write(self, name: str, text: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, 'file').write_text(text, 'utf-8')
            self.upload(name, Path(folder, 'file'))

    @retry(num_attempts=3)
    def upload(self, name: str, file: Path) -> None:
        self.store.upload_object(self.key(name), str(file))

    @retry(num_attempts=3)
    def delete(self, names: Collection[str]) -> None:
        for name in names:
            self.store.client.delete_object(Bucket=self.store.bucket, Key=self.key(name))  # pyright: ignore


Folder = Union[LocalFolder, RemoteFolder]


def open_folder(path: str) -> Folder:
    return RemoteFolder(path) if '://' in path else LocalFolder(path)

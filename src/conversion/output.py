"""Where the parts of a split go: a folder or a URL, each of them in one step."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Optional, Union

from src.common.errors import DISK_FULL, UserError, first_line
from src.common.storage import AnyFolder, LocalFolder, is_leftover, owner_tag
from src.config.data_places import is_missing, is_url
from src.conversion.sources import hide_url_secrets


class LocalOutput(LocalFolder):
    """A folder on a disk."""

    def listed(self, below: str = '') -> Optional[set[str]]:
        return None

    def send(self, folder: Path, names: Iterable[str]) -> None:
        """Moves files here, in this order."""
        for name in names:
            (folder / name).replace(self.root / name)

    def commit(self, staging: Path, name: str, last: str) -> None:
        """Moves a finished folder here; the file `last` says that it is whole."""
        target, damaged = self.root / name, staging.with_name(f'.old{staging.name}')
        if (target / last).exists():
            target.rename(damaged)
        staging.rename(target)  # fails where the folder has other contents
        shutil.rmtree(damaged, ignore_errors=True)


class RemoteOutput(AnyFolder):
    """A URL of any scheme that streaming writes and reads, by its own clients: Composer knows fewer of them."""

    remote = True

    def __init__(self, root: str) -> None:
        self.root = root

    def check(self) -> None:
        """Raises UserError where streaming does not write to such a URL, or the bucket is not there."""
        from streaming.base.storage.upload import UPLOADERS

        scheme, _, bucket = self.root.partition(':/')
        if scheme not in UPLOADERS or not bucket.strip('/'):
            known = ', '.join(f'{name}://' for name in UPLOADERS if name and '/' not in name)
            raise UserError(f'--out_root: {self.root}: must be a folder, or a bucket or the like with one of {known}')
        with tempfile.TemporaryDirectory() as empty:
            self.send(Path(empty), [])

    @contextmanager
    def reaching(self, verb: str, url: str) -> Iterator[None]:
        """Has an error of the store, which has classes of its own, say what could not be done."""
        try:
            yield
        except Exception as error:
            raise UserError(f'--out_root: cannot {verb} {hide_url_secrets(url)}: {type(error).__name__}: '
                            f'{hide_url_secrets(first_line(error))}; check the address, the network and the '
                            'credentials, then run the same command again: it goes on') from error

    def read_bytes(self, name: str) -> bytes:
        url = f'{self.root}/{name}'

        def download() -> bool:
            Path(file).unlink(missing_ok=True)  # half a file, of an attempt before
            try:
                _downloader(self.root).download(url, file)
            except Exception as error:
                if is_missing(error):
                    return False
                raise
            return True

        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, 'file')
            with self.reaching('read', url):
                there = self.ask(download, 5)
            if not there:
                raise FileNotFoundError(url)
            return Path(file).read_bytes()

    def listed(self, below: str = '') -> Optional[set[str]]:
        """The names of the files that begin with `below`; None where streaming cannot list the store."""
        if not self.root.startswith(('s3://', 'gs://')):
            return None
        with tempfile.TemporaryDirectory() as empty, self.reaching('list', self.root):
            keys = _uploader(empty, self.root).list_objects(below)
        prefix = self.root.partition('://')[2].partition('/')[2].rstrip('/') + '/'
        return {key.removeprefix(prefix) for key in keys}

    def send(self, folder: Path, names: Iterable[str], below: str = '') -> None:
        """Uploads files here, or below, in this order. Without any, it looks for the bucket."""
        url = f'{self.root}/{below}' if below else self.root
        with self.reaching('write', url):
            uploader = _uploader(str(folder), url)
            for name in names:
                uploader.upload_file(name)

    def commit(self, staging: Path, name: str, last: str) -> None:
        self.send(staging, [*sorted({*os.listdir(staging)} - {last}), last], name)


@cache  # its client takes a tenth of a second to make
def _downloader(root: str) -> Any:
    from streaming.base.storage.download import CloudDownloader

    return CloudDownloader.get(root)


def _uploader(folder: str, url: str) -> Any:
    from streaming.base.storage.upload import CloudUploader

    logging.getLogger('streaming.base.storage.upload').setLevel(logging.ERROR)  # it says that the folder is not empty
    return CloudUploader.get((folder, url), keep_local=True, retry=5, exist_ok=True)


Output = Union[LocalOutput, RemoteOutput]


def open_output(root: str) -> Output:
    return RemoteOutput(root) if is_url(root) else LocalOutput(root)


def read_if_exists(output: AnyFolder, name: str) -> Optional[bytes]:
    """A small file; None where there is none."""
    try:
        return output.read_bytes(name)
    except (FileNotFoundError, NotADirectoryError):
        return None


def disk_of(output: Output) -> Path:
    """The folder for what is unfinished: the output itself, or this machine's temporary folder."""
    return Path(tempfile.gettempdir() if output.remote else output.root).absolute()


def make_unfinished_folder(folder: Path, name: str) -> Path:
    """A new, empty folder whose name says which process has it."""
    path = folder / f'.{name}.partial-{owner_tag()}'
    path.mkdir(parents=True)
    return path


@contextmanager
def unfinished_folder(output: Output, name: str) -> Iterator[Path]:
    """An empty folder for what is not finished yet, removed in the end.

    Raises UserError where the disk is full or cannot be written. Sources turn their OSErrors into UserErrors before.
    """
    path, disk = None, disk_of(output)
    try:
        path = make_unfinished_folder(disk, name)
        yield path
    except OSError as error:
        mend = 'Free space' if error.errno in DISK_FULL else 'Mend the disk or its permissions'
        raise UserError(f'--out_root: cannot write {output.root}/{name} on {disk}: {error.strerror or error}; the '
                        f'unfinished part was removed, what was finished before is untouched. {mend}, then run the '
                        'same command again: it goes on') from error
    finally:
        if path:
            shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(output: Output, of_all: bool = False) -> None:
    """Removes what killed processes of this machine left unfinished; or what all did, once nothing is missing."""
    disk = disk_of(output)
    for path in chain(disk.glob('.*.partial-*'), Path(tempfile.gettempdir()).glob('.*.partial-*')):
        if is_leftover(path.name, of_all and path.parent == disk and not output.remote):
            shutil.rmtree(path, ignore_errors=True)


"""The output of a conversion: a folder, or a URL of an object store. A part appears there in one step."""

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

    def list_names(self, below: str = '') -> Optional[set[str]]:
        """Returns None: to look at single files of a disk is cheap."""
        return None

    def send(self, folder: Path, names: Iterable[str]) -> None:
        """Moves files from `folder` to the output, in this order."""
        for name in names:
            (folder / name).replace(self.root / name)

    def commit(self, staging: Path, name: str, last: str) -> None:
        """Moves a finished folder to the output; the file `last` marks it as complete."""
        target, damaged = self.root / name, staging.with_name(f'.old{staging.name}')
        if (target / last).exists():
            target.rename(damaged)
        staging.rename(target)  # fails if the target still has contents
        shutil.rmtree(damaged, ignore_errors=True)


class RemoteOutput(AnyFolder):
    """A URL, written and read by streaming's clients, which know more object stores than Composer's."""

    remote = True

    def __init__(self, root: str) -> None:
        self.root = root

    def check(self) -> None:
        """Raises UserError if streaming does not write to such a URL, or the bucket does not exist."""
        from streaming.base.storage.upload import UPLOADERS

        scheme, _, bucket = self.root.partition(':/')
        if scheme not in UPLOADERS or not bucket.strip('/'):
            known = ', '.join(f'{name}://' for name in UPLOADERS if name and '/' not in name)
            raise UserError(f'--out_root: {self.root}: must be a folder, or a URL with a bucket and one of {known}')
        with tempfile.TemporaryDirectory() as empty:
            self.send(Path(empty), [])

    @contextmanager
    def explain_errors(self, verb: str, url: str) -> Iterator[None]:
        """Turns every error of a store, which has classes of its own, into a UserError with `verb` and `url`."""
        try:
            yield
        except Exception as error:
            reason = f'{type(error).__name__}: {hide_url_secrets(first_line(error))}'
            raise UserError(f'--out_root: cannot {verb} {hide_url_secrets(url)}: {reason}; check the address, the '
                            'network and the credentials, then run the same command again: it continues') from error

    def read_bytes(self, name: str) -> bytes:
        url = f'{self.root}/{name}'

        def download() -> bool:
            Path(file).unlink(missing_ok=True)  # from an earlier attempt
            try:
                _downloader(self.root).download(url, file)
            except Exception as error:
                if is_missing(error):
                    return False
                raise
            return True

        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, 'file')
            with self.explain_errors('read', url):
                exists = self.call_with_retries(download, 5)
            if not exists:
                raise FileNotFoundError(url)
            return Path(file).read_bytes()

    def list_names(self, below: str = '') -> Optional[set[str]]:
        """Returns the names of the files that begin with `below`; None where streaming cannot list the store."""
        if not self.root.startswith(('s3://', 'gs://')):
            return None
        with tempfile.TemporaryDirectory() as empty, self.explain_errors('list', self.root):
            keys = _uploader(empty, self.root).list_objects(below)
        prefix = self.root.partition('://')[2].partition('/')[2].rstrip('/') + '/'
        return {key.removeprefix(prefix) for key in keys}

    def send(self, folder: Path, names: Iterable[str], below: str = '') -> None:
        """Uploads files to `below` in this order. Without files, it only checks that the bucket exists."""
        url = f'{self.root}/{below}' if below else self.root
        with self.explain_errors('write', url):
            uploader = _uploader(str(folder), url)
            for name in names:
                uploader.upload_file(name)

    def commit(self, staging: Path, name: str, last: str) -> None:
        self.send(staging, [*sorted({*os.listdir(staging)} - {last}), last], name)


@cache  # a client takes 0.1 s to make
def _downloader(root: str) -> Any:
    from streaming.base.storage.download import CloudDownloader

    return CloudDownloader.get(root)


def _uploader(folder: str, url: str) -> Any:
    from streaming.base.storage.upload import CloudUploader

    logging.getLogger('streaming.base.storage.upload').setLevel(logging.ERROR)  # it warns of a folder with files
    return CloudUploader.get((folder, url), keep_local=True, retry=5, exist_ok=True)


Output = Union[LocalOutput, RemoteOutput]


def open_output(root: str) -> Output:
    return RemoteOutput(root) if is_url(root) else LocalOutput(root)


def read_if_exists(output: AnyFolder, name: str) -> Optional[bytes]:
    """Returns the bytes of a small file; None where it does not exist."""
    try:
        return output.read_bytes(name)
    except (FileNotFoundError, NotADirectoryError):
        return None


def staging_root(output: Output) -> Path:
    """Returns the folder for unfinished parts: the output itself or, for a URL, this machine's temporary folder."""
    return Path(tempfile.gettempdir() if output.remote else output.root).absolute()


def make_unfinished_folder(folder: Path, name: str) -> Path:
    """Makes an empty folder, whose name tells which process uses it."""
    path = folder / f'.{name}.partial-{owner_tag()}'
    path.mkdir(parents=True)
    return path


@contextmanager
def unfinished_folder(output: Output, name: str) -> Iterator[Path]:
    """Gives an empty folder for an unfinished part, and removes the folder in the end.

    Raises UserError if the disk is full or cannot be written. An OSError here is always one of this disk, because
    sources raise UserError instead.
    """
    path, disk = None, staging_root(output)
    try:
        path = make_unfinished_folder(disk, name)
        yield path
    except OSError as error:
        remedy = 'Free space' if error.errno in DISK_FULL else 'Repair the disk or its permissions'
        raise UserError(f'--out_root: cannot write {output.root}/{name} on {disk}: {error.strerror or error}; the '
                        f'unfinished part was removed, finished parts stay. {remedy}, then run the same command again: '
                        'it continues') from error
    finally:
        if path:
            shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(output: Output, any_owner: bool = False) -> None:
    """Removes unfinished parts of killed processes of this machine; with `any_owner`, also those of other machines."""
    disk = staging_root(output)
    for path in chain(disk.glob('.*.partial-*'), Path(tempfile.gettempdir()).glob('.*.partial-*')):
        if is_leftover(path.name, any_owner and path.parent == disk and not output.remote):
            shutil.rmtree(path, ignore_errors=True)


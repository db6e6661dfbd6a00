"""The sources of documents: C4 or another dataset on the Hugging Face hub, a folder of files, the embedded sample.

A split is a list of files. One process reads a file, from its beginning to its end. Every source has:
    name, revision: For the manifest. The revision is the commit on the hub, None for files on a disk.
    columns: The columns of each document; the first holds the text.
    is_c4: Whether it is C4's config `en`, whose numbers of files and documents are known.
    files(split): The files of `train` or `val`, sorted. Raises UserError if there are none.
"""

import errno
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Optional, Union

from src.common.errors import DISK_FULL, UserError, exception_chain, first_line
from src.config.data_places import is_url
from src.conversion.documents import BadDocument, Document, read_documents
from src.conversion.source_files import C4_COLUMNS, ENDINGS, READABLE_ENDINGS, SPLIT_WORDS, FolderSource, SourceFile

C4 = 'allenai/c4'
C4_COUNTS = {'train': (1024, 364_868_892), 'val': (8, 364_608)}  # files and documents of its config `en`
MAX_ATTEMPTS = 10  # to fetch a file; the waits between them, 1 s to 1 min, add up to about 4 minutes
DISK_ERRORS = (*DISK_FULL, errno.EROFS)  # errno of an OSError that this machine causes, not the network


class SampleSource:
    """The embedded sample: documents in memory, one part for each split."""
    name, revision, columns, is_c4 = 'sample', None, C4_COLUMNS, False

    def __init__(self) -> None:
        from src.conversion.sample_corpus import gather_sample
        print('gathering the sample corpus (about 10 seconds)')
        self.corpus = gather_sample()

    def files(self, split: str) -> list[SourceFile]:
        return [SourceFile(f'sample {split}', sum(len(document['text'].encode()) for document in self.corpus[split]))]


class HubSource:
    """A dataset on the hub. The library `datasets` lists the files of each split; they are downloaded completely."""

    def __init__(self, dataset: str = C4, config: Optional[str] = None, revision: Optional[str] = None) -> None:
        from datasets import load_dataset_builder
        from huggingface_hub import HfApi

        self.config = config or ('en' if dataset == C4 else None)
        self.is_c4 = (dataset, self.config) == (C4, 'en')
        self.name = f'{dataset} {self.config or ""}'.strip()
        self.columns = C4_COLUMNS if dataset == C4 else C4_COLUMNS[:1]
        # Ask the hub first: without a network `datasets` takes 25 s, and its message does not name the network.
        call_with_retries(lambda: HfApi().dataset_info(dataset, revision=revision, timeout=30), self.name, attempts=3)
        try:
            load = partial(load_dataset_builder, dataset, self.config, revision=revision)
            builder = call_with_retries(load, self.name)
        except UserError:
            raise
        except (ValueError, RuntimeError) as error:  # an unknown config, files of unknown formats, a script
            raise UserError(f'--dataset: {self.name}: {hide_url_secrets(str(error))}; set --config') from None
        self.splits = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
        urls = [url for files in self.splits.values() for url in files]
        unreadable = [url for url in urls if not (url.lower().endswith(ENDINGS) and url.startswith('hf://datasets/'))]
        if unreadable or not urls:
            example = hide_url_secrets((unreadable or ['none'])[0])
            raise UserError(f'--dataset: {self.name} has files such as {example}; only files on the hub that end in '
                            f'{READABLE_ENDINGS} can be read; for files on this machine use --source FOLDER')
        self.revision = _split_hub_url(urls[0])[1]

    def files(self, split: str) -> list[SourceFile]:
        from huggingface_hub import HfApi

        name = next((name for name in SPLIT_WORDS[split] if name in self.splits), None)
        if name is None:
            raise UserError(f'--splits: {self.name} has no split {" or ".join(SPLIT_WORDS[split])}; it has: '
                            f'{", ".join(self.splits)}')
        urls = sorted(self.splits[name])
        sizes: dict[str, int] = {}
        for repo, revision, folder in {(*at, os.path.dirname(path)) for *at, path in map(_split_hub_url, urls)}:
            tree = partial(HfApi().list_repo_tree, repo, folder or None, revision=revision, repo_type='dataset')
            listed = call_with_retries(lambda tree=tree: list(tree()), self.name)
            sizes |= {f'hf://datasets/{repo}@{revision}/{e.path}': getattr(e, 'size', 0) for e in listed}
        return [SourceFile(url, sizes.get(url, 0)) for url in urls]


Source = Union[SampleSource, HubSource, FolderSource]


def _split_hub_url(url: str) -> tuple[str, str, str]:
    """Splits `hf://datasets/REPOSITORY@REVISION/PATH` into repository, revision and path."""
    repo, _, rest = url.removeprefix('hf://datasets/').partition('@')
    revision, _, path = rest.partition('/')
    return repo, revision, path


def hide_url_secrets(text: str) -> str:
    """Removes user, password and signature from the URLs in another library's message."""
    return re.sub(r'(\w+://[^\s?]*)\?[^\s\'")>]*', r'\1?***', re.sub(r'(\w+://)[^/\s@]+@', r'\1***@', text))


def _http_status(error: Optional[BaseException]) -> int:
    """Returns the HTTP status of an error or of its causes; 0 if there is none."""
    statuses = (getattr(getattr(cause, 'response', None), 'status_code', None) for cause in exception_chain(error))
    return next((status for status in statuses if status is not None), 0)


def _is_unreachable(error: Optional[BaseException]) -> bool:
    """Whether no connection could be made, which further attempts rarely change."""
    from httpx import ConnectError, ConnectTimeout  # of huggingface-hub from 1.0 on; earlier it used requests
    from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

    kinds = ConnectTimeoutError, NewConnectionError, ConnectError, ConnectTimeout
    return any(isinstance(cause, kinds) for cause in exception_chain(error))


def call_with_retries(call: Callable[[], Any], what: str, attempts: int = MAX_ATTEMPTS,
                      setting: str = '--source hub') -> Any:
    """Calls the hub until it answers, and waits longer after each failure.

    `what` is the thing that `call` asks for, and `setting` the option that names it, for messages. If no connection can
    be made, there are `attempts` attempts; if the hub answers 5xx or 429, or breaks the connection, MAX_ATTEMPTS.
    Raises UserError if the hub does not answer, has no such thing, or refuses this user; and OSError where this
    machine's disk is full or cannot be written.
    """
    from httpx import HTTPError
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    for attempt in count(1):
        try:
            return call()
        # The errors of requests, the hub and datasets are OSErrors; hf_xet raises RuntimeError
        except (OSError, EOFError, HFValidationError, HTTPError, RuntimeError) as error:
            if getattr(error, 'errno', None) in DISK_ERRORS or 'scripts are no longer supported' in str(error):
                raise
            reason = f'{type(error).__name__}: {hide_url_secrets(first_line(error))}'
            is_absent = isinstance(error, (FileNotFoundError, HFValidationError))
            is_refused = 400 <= (status := _http_status(error)) < 500 and status not in (408, 429)
            if is_refused or is_absent and not isinstance(error, LocalEntryNotFoundError):
                raise UserError(f'{setting}: {what} is not on the hub, or you have no access: check the name and '
                                '--revision; for a private or gated dataset log in with `hf auth login`, or set '
                                f'HF_TOKEN\n{reason}') from error
            limit = attempts if not status and _is_unreachable(error) else MAX_ATTEMPTS
            if constants.HF_HUB_OFFLINE or attempt >= limit:
                endpoint = hide_url_secrets(constants.ENDPOINT)
                raise UserError(f'{setting}: cannot reach {what} on the hub: check the network, HF_ENDPOINT '
                                f'({endpoint}) and that HF_HUB_OFFLINE is not set, then run again; or use --source '
                                "FOLDER with C4's own files, or --source sample, which needs no network\n"
                                f'{reason}') from error
            print(f'note: {what}: attempt {attempt} of {limit} failed: {reason}', flush=True)
            time.sleep(min(2 ** (attempt - 1), 60))
    return None


def local_file(path: str, folder: Path, quiet: bool = True) -> Path:
    """Returns the path of the file on this disk. A file on the hub is downloaded to `folder` first.

    A new attempt continues an interrupted download. Raises UserError if the hub does not send the file, and OSError
    where the disk is full.
    """
    if not is_url(path):
        return Path(path)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if quiet:
        disable_progress_bars()  # the bars of several workers would overwrite each other
    repo, revision, name = _split_hub_url(path)
    download = partial(hf_hub_download, repo, name, revision=revision, repo_type='dataset', local_dir=folder)
    return Path(call_with_retries(download, path))


def read_source_file(file: SourceFile, folder: Path, columns: Iterable[str], text_column: str, txt_lines: bool,
                     quiet: bool = True) -> Iterator[Document | BadDocument]:
    """Yields the documents of a file. A file on the hub is downloaded to `folder` first."""
    for path in file.paths:
        yield from read_documents(local_file(path, folder, quiet), columns, text_column, path, txt_lines)

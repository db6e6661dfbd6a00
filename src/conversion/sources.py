"""Where documents come from: C4 or another data set on the Hugging Face hub, a folder of files, the embedded sample.

A split is a list of files. A file is the unit of work of a conversion: one process reads it, from its beginning to its
end. Every source has:
    name, revision: For the manifest; the commit of the hub's repository, None for files.
    columns: What each document is stored with; the first holds the text.
    is_c4: Whether it is C4's config `en`, whose files and documents are counted.
    files(split): The files of `train` or `val`, sorted. Raises UserError where there are none.
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
from src.conversion.documents import BadDocument, Document, documents
from src.conversion.source_files import C4_COLUMNS, FORMATS, READABLE, SPLIT_WORDS, FolderSource, SourceFile

C4 = 'allenai/c4'
C4_COUNTS = {'train': (1024, 364_868_892), 'val': (8, 364_608)}  # files, documents of its config `en`
ATTEMPTS = 10  # to fetch a file; the waits between them, 1 s to 1 min, sum to about 4 minutes
DISK = (*DISK_FULL, errno.EROFS)  # of an OSError: this machine's fault, not the network's


class SampleSource:
    """The embedded sample: documents in memory, one part a split."""
    name, revision, columns, is_c4 = 'sample', None, C4_COLUMNS, False

    def __init__(self) -> None:
        from src.conversion.sample_corpus import gather
        print('gathering the sample corpus (about 15 seconds)')
        self.corpus = gather()

    def files(self, split: str) -> list[SourceFile]:
        return [SourceFile(f'sample {split}', sum(len(document['text'].encode()) for document in self.corpus[split]))]


class HubSource:
    """A data set on the hub. The client of `datasets` says which files make a split; they are fetched whole."""

    def __init__(self, dataset: str = C4, config: Optional[str] = None, revision: Optional[str] = None) -> None:
        from datasets import load_dataset_builder
        from huggingface_hub import HfApi

        self.config = config or ('en' if dataset == C4 else None)
        self.is_c4 = (dataset, self.config) == (C4, 'en')
        self.name = f'{dataset} {self.config or ""}'.strip()
        self.columns = C4_COLUMNS if dataset == C4 else C4_COLUMNS[:1]
        # asked first: `datasets` takes 25 s to find that nobody is there, and does not say so
        call_with_retries(lambda: HfApi().dataset_info(dataset, revision=revision, timeout=30), self.name, attempts=3)
        try:
            builder = call_with_retries(lambda: load_dataset_builder(dataset, self.config, revision=revision),
                                        self.name)
        except UserError:
            raise
        except (ValueError, RuntimeError) as error:  # a config that is not there, no files that are known, a script
            raise UserError(f'--dataset: {self.name}: {hide_url_secrets(str(error))}; set --config') from None
        self.splits = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
        urls = [url for files in self.splits.values() for url in files]
        wrong = [url for url in urls if not (url.lower().endswith(FORMATS) and url.startswith('hf://datasets/'))]
        if wrong or not urls:
            example = hide_url_secrets((wrong or ['none'])[0])
            raise UserError(f'--dataset: {self.name} consists of files such as {example}; those that convert are on '
                            f'the hub and end in {READABLE}; files on this machine are --source FOLDER')
        self.revision = _hub_parts(urls[0])[1]

    def files(self, split: str) -> list[SourceFile]:
        from huggingface_hub import HfApi

        name = next((name for name in SPLIT_WORDS[split] if name in self.splits), None)
        if name is None:
            raise UserError(f'--splits: {self.name} has no split {" or ".join(SPLIT_WORDS[split])}; it has: '
                            f'{", ".join(self.splits)}')
        urls = sorted(self.splits[name])
        sizes: dict[str, int] = {}
        for repo, revision, folder in {(*_hub_parts(url)[:2], os.path.dirname(_hub_parts(url)[2])) for url in urls}:
            tree = partial(HfApi().list_repo_tree, repo, folder or None, revision=revision, repo_type='dataset')
            listed = call_with_retries(lambda tree=tree: list(tree()), self.name)
            sizes |= {f'hf://datasets/{repo}@{revision}/{e.path}': getattr(e, 'size', 0) for e in listed}
        return [SourceFile(url, sizes.get(url, 0)) for url in urls]


Source = Union[SampleSource, HubSource, FolderSource]


def _hub_parts(url: str) -> tuple[str, str, str]:
    """Repository, revision and path of `hf://datasets/REPOSITORY@REVISION/PATH`."""
    repo, _, rest = url.removeprefix('hf://datasets/').partition('@')
    revision, _, path = rest.partition('/')
    return repo, revision, path


def hide_url_secrets(text: str) -> str:
    """A message of others without the secrets that URLs in it carry: user, password, signature."""
    return re.sub(r'(\w+://[^\s?]*)\?[^\s\'")>]*', r'\1?***', re.sub(r'(\w+://)[^/\s@]+@', r'\1***@', text))


def _status(error: Optional[BaseException]) -> int:
    """The HTTP status behind an error, which libraries wrap in their own; 0: there is none."""
    found = (getattr(getattr(cause, 'response', None), 'status_code', None) for cause in exception_chain(error))
    return next((status for status in found if status is not None), 0)


def _nobody_there(error: Optional[BaseException]) -> bool:
    """Whether no connection came about, which is no matter of a bad moment."""
    from httpx import ConnectError, ConnectTimeout  # of huggingface-hub from 1.0 on, which has left requests
    from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

    kinds = ConnectTimeoutError, NewConnectionError, ConnectError, ConnectTimeout
    return any(isinstance(cause, kinds) for cause in exception_chain(error))


def call_with_retries(call: Callable[[], Any], what: str, attempts: int = ATTEMPTS,
                      setting: str = '--source hub') -> Any:
    """Calls the hub until it answers, waiting longer each time.

    `what` is the object of `call`, for messages, and `setting` the one that it belongs to. Where nobody answers at all
    it makes `attempts`; a hub that answers 5xx or 429, or hangs up, is asked ATTEMPTS times. Raises UserError where the
    hub does not answer, or says that there is no such thing, or not for this user; and OSError where this machine's
    disk is full or cannot be written.
    """
    from httpx import HTTPError
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    for attempt in count(1):
        try:
            return call()
        # OSErrors are every one of requests, the hub and datasets too; hf_xet has no class of its own
        except (OSError, EOFError, HFValidationError, HTTPError, RuntimeError) as error:
            if getattr(error, 'errno', None) in DISK or 'scripts are no longer supported' in str(error):
                raise
            said = f'{type(error).__name__}: {hide_url_secrets(first_line(error))}'
            missing = isinstance(error, (FileNotFoundError, HFValidationError))
            refused = 400 <= (status := _status(error)) < 500 and status not in (408, 429)
            if refused or missing and not isinstance(error, LocalEntryNotFoundError):
                raise UserError(f'{setting}: the hub has no {what}, or not for you: check the name and --revision; for '
                                'a private or gated data set log in with `hf auth login` or set HF_TOKEN\n'
                                f'{said}') from error
            limit = attempts if not status and _nobody_there(error) else ATTEMPTS
            if constants.HF_HUB_OFFLINE or attempt >= limit:
                raise UserError(f'{setting}: cannot reach {what} on the hub: check the network, HF_ENDPOINT '
                                f'({hide_url_secrets(constants.ENDPOINT)}) and that HF_HUB_OFFLINE is not set, then '
                                "run again; or use --source FOLDER with C4's own files, or --source sample, which "
                                f'needs no network\n{said}') from error
            print(f'note: {what}: {said}; attempt {attempt} of {limit}', flush=True)
            time.sleep(min(2 ** (attempt - 1), 60))
    return None


def local_file(path: str, folder: Path, quiet: bool = True) -> Path:
    """The file on this disk. One of the hub is downloaded below `folder`, and goes on where an earlier attempt was cut.

    Raises UserError where the hub does not give it, and OSError where the disk is full.
    """
    if not is_url(path):
        return Path(path)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if quiet:
        disable_progress_bars()  # not one for each worker, over one another
    repo, revision, name = _hub_parts(path)
    download = partial(hf_hub_download, repo, name, revision=revision, repo_type='dataset', local_dir=folder)
    return Path(call_with_retries(download, path))


def read(file: SourceFile, folder: Path, columns: Iterable[str], text_column: str, txt_lines: bool,
         quiet: bool = True) -> Iterator[Document | BadDocument]:
    """The documents of a file, which is fetched to `folder` first if it is of the hub."""
    for path in file.paths:
        yield from documents(local_file(path, folder, quiet), columns, text_column, path, txt_lines)

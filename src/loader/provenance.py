"""Which tokenizer made the tokens of a dataset: convert_c4.py writes that into the manifest beside an index."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any, Optional

from streaming.base.distributed import get_local_rank
from streaming.base.util import retry

from src.common.errors import UserError
from src.config.data_places import explain, is_missing, is_url
from src.loader.streams import CheckedStream


def check_tokenizer(stream: CheckedStream, tokenizer: Any) -> None:
    """Refuses tokens that another tokenizer made.

    For data without a manifest of convert_c4.py there is nothing to compare. In an object store one process of each
    node alone looks.

    Raises:
        UserError: The tokens are of another tokenizer, or the manifest cannot be read.
    """
    if is_url(stream.remote) and get_local_rank() != 0:
        return
    try:
        text = _read(stream, 'manifest.json')
    except Exception as e:  # each object store has error classes of its own
        raise UserError(explain(e, stream.remote, stream.local, stream.split, stream.setting)) from None
    if text is None:
        return
    try:
        manifest = json.loads(text)
    except ValueError:
        raise UserError(f'{stream.setting}: manifest.json of {stream.place} is no whole manifest; copy it again, or '
                        'delete it if it is not of convert_c4.py') from None
    options = manifest.get('options') if isinstance(manifest, dict) else None  # another tool's has none
    its_hash = options.get('tokenizer_hash') if isinstance(options, dict) else None
    if its_hash:
        tokenizer.check_made(f'the tokens in {stream.place}', manifest.get('tokenizer_name'), str(its_hash))


def _read(stream: CheckedStream, name: str) -> Optional[bytes]:
    """A small file beside the index where the data comes from; None where there is none."""
    path = os.path.join(stream.place, name)

    @retry(num_attempts=1 + stream.download_retry)
    def read() -> Optional[bytes]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                if not is_url(stream.remote):
                    return Path(path).read_bytes()
                stream._downloader.download(path, f'{folder}/{name}', stream.download_timeout)
                return Path(folder, name).read_bytes()
            except Exception as e:  # as above
                if is_missing(e, or_forbidden=True):
                    return None
                raise

    return read()

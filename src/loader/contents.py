"""Detects whether a dataset holds text or packed tokens, and checks which tokenizer made the tokens."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Optional

from numpy.typing import NDArray
from streaming.base.distributed import get_local_rank
from streaming.base.util import retry

from src.common.errors import UserError
from src.config.data_places import explain_streaming_error, is_missing, is_url
from src.loader.dataset import CheckedDataset
from src.loader.streams import CheckedStream


def find_column(dataset: CheckedDataset, max_seq_len: int) -> str:
    """The name of the column that all streams of a dataset have: `tokens` or `text`.

    Raises UserError if a stream has neither, the streams differ, or sequences do not fit `max_seq_len`.
    """
    contents = {stream.setting: _describe_contents(stream, dataset.shards[int(first)], max_seq_len)
                for stream, first in zip(dataset.streams, dataset.shard_offset_per_stream)}
    if len(set(contents.values())) > 1:
        raise UserError('dataset.streams: all must hold text, or all tokens of one length, but ' +
                        '; '.join(f'{name} holds {content}' for name, content in contents.items()))
    return 'text' if 'text' in contents.values() else 'tokens'


def _describe_contents(stream: CheckedStream, shard: Any, max_seq_len: int) -> str:
    """Says in words what a stream holds, by its first shard. Streams that can be read together get the same words."""
    if not hasattr(shard, 'column_encodings'):
        raise UserError(f'{stream.setting}: {stream.place} holds no shards of the format MDS; write it with MDSWriter')
    encodings = dict(zip(shard.column_names, shard.column_encodings))
    if 'text' in encodings and 'tokens' not in encodings:
        if encodings['text'] not in ('str', 'json'):
            raise UserError(f"{stream.setting}: column 'text' of {stream.place} is {encodings['text']!r}; it must be "
                            "'str'")
        return 'text'
    # An encoding such as ndarray:uint16:128, where type and length may be missing
    encoding, dtype, shape = (encodings.get('tokens', '') + '::').split(':')[:3]
    if encoding != 'ndarray' or (dtype and not dtype.startswith(('int', 'uint'))):
        raise UserError(f"{stream.setting}: {stream.place} has no column 'text' of documents and no column 'tokens' of "
                        f"arrays of integers, such as 'ndarray:uint16'; its columns are {encodings}")
    if shape:
        _check_shape(tuple(map(int, shape.split(','))), max_seq_len, stream.place)
        return f'sequences of {shape} tokens'
    if Path(shard.dirname, shard.split, shard.raw_data.basename).is_file():
        check_tokens(shard[0]['tokens'], max_seq_len, stream.place)
    return 'sequences of tokens'


def check_tokens(tokens: NDArray, max_seq_len: int, place: str) -> None:
    """Raises UserError if a row of the column `tokens` is not `max_seq_len` or `max_seq_len + 1` integers."""
    if tokens.dtype.kind not in 'iu':
        raise UserError(f"dataset: column 'tokens' of {place} holds {tokens.dtype}; it must hold integers")
    _check_shape(tokens.shape, max_seq_len, place)


def _check_shape(shape: tuple[int, ...], max_seq_len: int, place: str) -> None:
    if len(shape) != 1:
        raise UserError(f"dataset: column 'tokens' of {place} holds arrays of shape {shape}; each must be one "
                        f'sequence, of shape ({max_seq_len},) or ({max_seq_len + 1},)')
    if shape[0] not in (max_seq_len, max_seq_len + 1):
        raise UserError(f'dataset.max_seq_len: {max_seq_len}, but the sequences in {place} have {shape[0]} tokens; set '
                        f'max_seq_len={shape[0]}, or {shape[0] - 1} (then the last position has a target too), '
                        f'or convert the data again with sequences of {max_seq_len} or {max_seq_len + 1}')


# ---------------------------------------------------------------- which tokenizer made the tokens
def check_tokenizer(stream: CheckedStream, tokenizer: Any) -> None:
    """Checks that `tokenizer` made the tokens of a stream, by the manifest that convert_c4.py wrote beside the index.

    Data without such a manifest is not checked. In an object store, only one process of each node looks. Raises
    UserError if another tokenizer made the tokens, or where the manifest cannot be read.
    """
    if is_url(stream.remote) and get_local_rank() != 0:
        return
    try:
        text = _read_beside_index(stream, 'manifest.json')
    except Exception as e:  # each object store has error classes of its own
        why = explain_streaming_error(e, stream.remote, stream.local, stream.split, stream.setting)
        raise UserError(f'{why} (manifest.json)') from None
    try:
        manifest: Any = None if text is None else json.loads(text)
    except ValueError:
        raise UserError(f'{stream.setting}: manifest.json of {stream.place} is not complete JSON; copy it again, or '
                        'delete it if convert_c4.py did not write it') from None
    options = manifest.get('options') if isinstance(manifest, dict) else None  # another tool's manifest has none
    tokenizer_hash = options.get('tokenizer_hash') if isinstance(options, dict) else None
    if tokenizer_hash:
        tokenizer.check_made_with(f'the tokens in {stream.place}', manifest.get('tokenizer_name'), str(tokenizer_hash))


def _read_beside_index(stream: CheckedStream, name: str) -> Optional[bytes]:
    """Reads a small file that lies beside the index of the original data; None where there is no such file."""
    path = os.path.join(stream.place, name)

    @retry(num_attempts=1 + stream.download_retry)
    def read() -> Optional[bytes]:
        with TemporaryDirectory() as folder:
            copy = Path(folder, name) if is_url(path) else Path(path)
            try:
                if is_url(path):
                    stream._downloader.download(path, str(copy), stream.download_timeout)
                return copy.read_bytes()
            except Exception as e:  # each object store has error classes of its own
                if is_missing(e, or_forbidden=True):
                    return None
                raise
            finally:
                if is_url(path):  # loader workers and further attempts must not inherit the connection
                    stream._downloader.clean_up()

    return read()

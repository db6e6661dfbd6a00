"""Writes documents to MDS shards: as text, or as tokens that are packed into sequences."""

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray

from src.common.errors import UserError
from src.conversion.documents import Document


@dataclass(frozen=True)
class Options:
    """The options that, with its file, decide the bytes of a part."""
    columns: tuple[str, ...]
    text_column: str = 'text'
    concat_tokens: Optional[int] = None  # tokens in a sequence; None stores text
    tokenizer: Optional[str] = None  # a hub name or a local folder, to load it from
    tokenizer_name: Optional[str] = None  # the name for the manifest
    tokenizer_hash: Optional[str] = None
    compression: Optional[str] = None
    hashes: tuple[str, ...] = ()
    size_limit: Optional[str] = None
    skip_bad_docs: bool = False
    txt_lines: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """The options that a second run must repeat. Where the tokenizer lies may change, but not its hash."""
        options = asdict(self) | {'columns': list(self.columns), 'hashes': list(self.hashes)}  # lists, as JSON has them
        left_out = ['tokenizer', 'tokenizer_name', *([] if self.txt_lines else ['txt_lines'])]
        return {name: value for name, value in options.items() if name not in left_out}


def check_streaming_options(compression: Optional[str], hashes: Sequence[str], size_limit: Optional[str]) -> None:
    """Raises UserError for values that streaming's writer does not know."""
    if compression is None and not hashes and size_limit is None:
        return  # before the import, which takes seconds: a mistake in another argument is told at once
    from streaming.base.compression import get_compressions, is_compression
    from streaming.base.hashing import get_hashes, is_hash
    from streaming.base.util import bytes_to_int

    named = [('compression', compression, is_compression, get_compressions)] if compression is not None else []
    for setting, name, is_known, known in [*named, *(('hashes', name, is_hash, get_hashes) for name in hashes)]:
        if not is_known(name):
            raise UserError(f'--{setting}: {name!r} is not known; set one of {", ".join(sorted(known()))}')
    try:
        if size_limit is not None and not 0 < bytes_to_int(size_limit) < 2**32:
            raise ValueError
    except ValueError:
        raise UserError(f'--size_limit: {size_limit!r} is not a size below 4gb; set one such as 64mb, or a number of '
                        'bytes') from None


def write_shards(documents: Iterator[Document], folder: Path, options: Options, counts: dict[str, int]) -> None:
    """Writes shards and their index to `folder`, and puts the number of tokens, if any, into `counts`."""
    from streaming import MDSWriter

    class ShardWriter(MDSWriter):
        def encode_sample(self, sample: dict[str, Any]) -> bytes:
            # The same bytes as MDSWriter's, which looks up each column's encoding again: a third of the whole time.
            if options.concat_tokens:
                return sample['tokens'].tobytes()
            data = [sample[name].encode() for name in self.column_names]
            return struct.pack(f'<{len(data)}I', *map(len, data)) + b''.join(data)

        def encode_joint_shard(self) -> bytes:
            # Only what stands before the samples. MDSWriter's makes three copies of the samples.
            count, sizes = np.uint32(len(self.new_samples)).tobytes(), np.array([0, *map(len, self.new_samples)])
            offsets = sizes.cumsum() + len(count) + 4 * len(sizes) + len(self.config_data)
            return count + offsets.astype(np.uint32).tobytes() + self.config_data

        def flush_shard(self) -> None:
            if self.new_samples:  # a sample larger than a shard would leave an empty shard before it
                super().flush_shard()

        def _process_file(self, raw_data: bytes, raw_basename: str, zip_basename: Optional[str]) -> tuple[dict, Any]:
            data = [raw_data, *self.new_samples]
            if not zip_basename and not self.hashes:
                with Path(self.local, raw_basename).open('wb') as file:
                    file.writelines(data)
                return {'basename': raw_basename, 'bytes': sum(map(len, data)), 'hashes': {}}, None
            raw, zipped = super()._process_file(b''.join(data), raw_basename, zip_basename)
            if zip_basename and zip_basename.endswith('.gz'):  # clear the time, bytes 4 to 8
                path = Path(self.local, zip_basename)
                zip_data = path.read_bytes()
                path.write_bytes(zip_data := zip_data[:4] + bytes(4) + zip_data[8:])
                zipped = self._hash(zip_data, zip_basename)
            return raw, zipped

    columns, rows = dict.fromkeys(options.columns, 'str'), documents
    if options.concat_tokens:
        tokenizer = load_tokenizer(options.tokenizer or '', options.concat_tokens).tokenizer
        columns = {'tokens': f'ndarray:{token_dtype(tokenizer).name}:{options.concat_tokens}'}
        rows = ({'tokens': row} for row in pack_tokens(documents, tokenizer, options.concat_tokens, counts))
    limit: dict[str, Any] = {'size_limit': options.size_limit} if options.size_limit else {}
    writer = ShardWriter(out=str(folder), columns=columns, compression=options.compression, hashes=list(options.hashes),
                         **limit)
    for row in rows:
        writer.write(row)
    writer.finish()  # not `with`, which would finish the shards after an error, too


@cache
def load_tokenizer(name: str, length: int) -> Any:
    """Returns an HFTokenizer that is ready to encode. Processes that are forked later share it."""
    from src.common.encoding import prepare
    from src.tokenizer import HFTokenizer

    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')  # each worker process uses one core
    tokenizer = HFTokenizer(name, length)
    prepare(tokenizer.tokenizer)
    return tokenizer


def token_dtype(tokenizer: Any) -> np.dtype:
    """Returns the smallest type that holds every id of a tokenizer, those of added tokens too."""
    return np.min_scalar_type(max(tokenizer.get_vocab().values()))


def pack_tokens(documents: Iterator[Document], tokenizer: Any, length: int, counts: dict[str, int],
                ) -> Iterator[NDArray]:
    """Joins documents, each with EOS at its end, and cuts them into sequences of `length` tokens.

    The last sequence is filled up with EOS, so that no token is dropped. `counts['tokens']` counts all but this fill.
    """
    from src.common.encoding import encode_pieces

    counts['tokens'] = 0
    rest: NDArray = np.empty(0, token_dtype(tokenizer))
    for pieces in encode_pieces(tokenizer, (document['text'] for document in documents)):
        stream = np.concatenate([rest, *(ids for ids, _ in pieces)], dtype=rest.dtype, casting='unsafe')
        counts['tokens'] += len(stream) - len(rest)
        full = len(stream) // length * length
        rest = stream[full:]
        yield from stream[:full].reshape(-1, length)
    if len(rest):
        yield np.pad(rest, (0, length - len(rest)), constant_values=tokenizer.eos_token_id)

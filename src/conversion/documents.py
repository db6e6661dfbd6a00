"""The documents of a file: JSON lines, plain text or Parquet, as they are or compressed."""

import codecs
import io
import json
import re
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any, NamedTuple, Optional

import orjson
from isal import igzip, igzip_lib

from src.common.errors import UserError
from src.conversion.source_files import TXT, listing

SHOWN = 5  # documents that --skip_bad_docs names, of each file
MAX_TEXT = 1 << 30  # bytes of a text file that is one document
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # the first is the start of UTF-32's, too
# How files begin that are gzip, zstd, Parquet, zip, bzip2 or xz, or zeros that a damaged disk gives
NOT_TEXT = (b'\x1f\x8b', b'\x28\xb5\x2f\xfd', b'PAR1\x15', b'PK\x03\x04', b'BZh91AY&SY', b'\xfd7zXZ', bytes(4))

Document = dict[str, str]


class Bad(NamedTuple):
    """A document that cannot be used, and why."""
    reason: str
    setting: str = '--source'
    several: bool = False  # documents that are not on lines of their own

    @property
    def error(self) -> UserError:
        """For a conversion that is not told to skip it."""
        return UserError(f'{self.setting}: {self.reason}; or leave such documents out with --skip_bad_docs')


def good_documents(found: Iterable[Document | Bad], skip_bad_docs: bool, counts: dict[str, int], shown: int = SHOWN,
                   ) -> Iterator[Document]:
    """The documents of one file that can be used.

    Args:
        found: From `documents`.
        skip_bad_docs: Whether bad documents are left out, in place of an error.
        counts: `bad_documents` is raised by those that are left out.
        shown: How many of them are named.

    Raises:
        UserError: A document is bad; or, with `skip_bad_docs`, all of several are, so that a whole file would be left out.
    """
    good, bad, first = 0, 0, None
    for document in found:
        if not isinstance(document, Bad):
            good += 1
            yield document
            continue
        if not skip_bad_docs:
            raise document.error
        first = first or document
        bad += 1
        counts['bad_documents'] += 1
        if bad <= shown:
            print(f'skipped: {document.reason}', flush=True)
    if first and not good and (bad > 1 or first.several):
        raise UserError(f'{first.setting}: {first.reason}; none of the documents of this file can be used, and '
                        '--skip_bad_docs leaves out a document, not a file: mend the file, or move it away')


def documents(path: Path, columns: Iterable[str], text_column: str = 'text', where: Optional[str] = None,
              txt_lines: bool = False) -> Iterator[Document | Bad]:
    """The documents of a file in order, each with `columns` as strings. One that cannot be used is `Bad`.

    Args:
        path: The file. The end of its name, in small or capital letters, says its format.
        columns: Of each document.
        text_column: The field of the file that becomes the column `text`.
        where: The name of the file in messages.
        txt_lines: Whether each line of a text file is a document, in place of the whole file.

    Raises:
        UserError: The file is cut short or damaged, so that what follows is lost; or no document can have the text.
    """
    names = [(column, text_column if column == 'text' else column) for column in columns]
    where, name = where or str(path), path.name.lower()
    kind = 'row' if name.endswith('.parquet') else 'document' if name.endswith(TXT) and not txt_lines else 'line'
    number = 0

    def bad(reason: str, setting: str = '--source', several: bool = False) -> Bad:
        return Bad(f'{where}, {kind} {number} {reason}', setting, several)

    try:
        for number, row in _rows(path, where, [name for _, name in names], txt_lines):  # noqa: B007  (`bad` reads it)
            if isinstance(row, Bad):
                yield bad(row.reason, several=row.several)
                continue
            if isinstance(row, dict) and text_column not in row:
                # JSON can spell names that cannot be printed.
                fields = listing(list(row)).encode(errors='backslashreplace').decode()
                yield bad(f'has no field {text_column!r}; it has: {fields or "none"}', '--text_column')
                continue
            document: dict[str, Any] = {column: row.get(name) if isinstance(row, dict) else None
                                        for column, name in names}
            if {*map(type, document.values())} != {str}:
                document = {column: _as_text(value) for column, value in document.items()}
                wrong = [name for column, name in names if not isinstance(document[column], str)]
                if wrong:
                    reasons = [value.reason for value in document.values() if isinstance(value, Bad)]
                    columns_of_json = kind == 'line' and isinstance(document['text'], (dict, list))
                    yield bad(reasons[0] if reasons else f'has no string {", ".join(wrong)}; a document is an object '
                              f'with the strings {", ".join(name for _, name in names)}' + columns_of_json *
                              '; write an object a line (df.to_json(FILE, orient="records", lines=True) does)',
                              several=columns_of_json)
                    continue
            if not (joined := ''.join(document.values())).isascii() and not _is_unicode(joined):
                yield bad('holds characters that are not Unicode text; download the file again')
            else:
                yield document
    except UserError:
        raise
    except (OSError, EOFError, ValueError, igzip_lib.IsalError) as error:  # pyright: ignore  (its stub has an instance)
        if isinstance(error, OSError) and error.errno:
            raise UserError(f'--source: {where} cannot be read after {kind} {number} ({error.strerror}); mend that, '
                            'then run again') from error
        raise UserError(f'--source: {where} cannot be read after {kind} {number}: it is cut short or damaged '
                        f'({error}); download the file again') from error


def _as_text(value: Any) -> Any:
    """What C4 has as a string and Parquet may have as something else."""
    if isinstance(value, datetime):  # C4 has 2019-04-25T12:57:54Z
        return (value.astimezone(timezone.utc) if value.tzinfo else value).strftime('%Y-%m-%dT%H:%M:%SZ')
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            return Bad(f'holds bytes that are not UTF-8 ({error.reason}, byte {error.start}); write the file as UTF-8')
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        return False
    return True


def _rows(path: Path, where: str, names: list[str], txt_lines: bool) -> Iterator[tuple[int, Any]]:
    """Number, from 1, and value of each row, line or text that is not blank."""
    name = path.name.lower()
    if name.endswith('.parquet'):
        yield from _parquet_rows(path, names)
    elif not name.endswith(TXT):
        yield from _json_rows(path, where, names[0])
    else:
        for number, text in enumerate(_lines(path, where) if txt_lines else _whole(path, where), start=1):
            if text.strip():
                nul = Bad('holds NUL bytes: it is damaged or not UTF-8; download the file again, or write it as UTF-8')
                line = text.removesuffix(b'\n').removesuffix(b'\r') if txt_lines else text
                yield number, nul if 0 in text else {names[0]: line}


def _parquet_rows(path: Path, names: list[str]) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet  # its errors are OSError and ValueError

    with parquet.ParquetFile(path) as file:
        known, number = file.schema_arrow.names, 0
        if names[0] not in known:
            raise UserError(f'--text_column: {path.name} has no column {names[0]!r}; it has: {", ".join(known)}')
        for batch in file.iter_batches(1000, columns=[name for name in names if name in known]):
            try:
                rows = batch.to_pylist()
            except UnicodeDecodeError:  # of one string: as bytes, they are decoded one by one
                strings, binary = {pyarrow.string(), pyarrow.large_string()}, pyarrow.large_binary()
                columns = [column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column
                           for column in batch.columns]
                columns = [column.cast(binary) if column.type in strings else column for column in columns]
                rows = pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names).to_pylist()
            yield from enumerate(rows, start=number + 1)
            number += len(rows)


def _json_rows(path: Path, where: str, text_column: str) -> Iterator[tuple[int, Any]]:
    first = True
    for number, line in enumerate(_lines(path, where), start=1):
        if line.isspace():
            continue
        try:
            row = orjson.loads(line)
        except ValueError:
            try:
                row = json.loads(line)  # what the standard alone refuses: NaN, half a surrogate pair, a byte order mark
            except (ValueError, RecursionError) as error:
                several = 'Extra data' in str(error)
                row = Bad(f'is not JSON ({error}); ' + several * 'write an object a line (jq -c . does), or ' +
                          'download the file again', several=several)
        if first:
            _check_first_row(row, line, where, text_column)
        elif isinstance(row, list) and row and isinstance(row[0], dict):
            raise _array(f'{where}, line {number}')
        first = False
        yield number, row


def _array(what: str) -> UserError:
    return UserError(f'--source: {what} is one JSON array; write an object a line (jq -c .[] does)')


def _check_first_row(row: Any, line: bytes, where: str, text_column: str) -> None:
    """Raises UserError where all documents are in one JSON value, which would count as one bad document."""
    if isinstance(row, Bad) and re.match(rb'\s*\[\s*([{"]|$)', line) or isinstance(row, list) and row:
        raise _array(where)
    if isinstance(row, Bad) and line.strip() == b'{':
        raise UserError(f'--source: {where} is JSON over several lines; write an object a line (jq -c . does)')
    if isinstance(row, dict) and text_column not in row:
        for name, value in row.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                raise UserError(f'--source: {where} is one JSON object with a list {name!r}; write an object a line '
                                f"(jq -c '.{name}[]' does), or, if the text is in another field, set --text_column")


def _lines(path: Path, where: str) -> Iterator[bytes]:
    """The lines of a file with their ends. A byte order mark of UTF-8 is left out."""
    lines = _raw_lines(path, where)
    first = next(lines, b'')
    if first.startswith(NOT_TEXT):
        raise UserError(f'--source: {where} holds no text: it is damaged, or of a format that its name does not end '
                        'in, such as .gz, .zst or .parquet; rename, unpack or delete it')
    if first.startswith(UTF_16) or 0 in first[:4]:
        raise UserError(f'--source: {where} is UTF-16 or UTF-32 text; write it as UTF-8 (iconv -f UTF-16 -t UTF-8)')
    if first:
        yield first.removeprefix(codecs.BOM_UTF8)
    yield from lines


def _whole(path: Path, where: str) -> Iterator[bytes]:
    """The one document of a text file."""
    lines, size = [], 0
    for line in _lines(path, where):
        lines.append(line)
        size += len(line)
        if size > MAX_TEXT:
            raise UserError(f'--source: {where} has more than {MAX_TEXT:,} bytes, and would be one document; '
                            'add --txt_lines if each line is a document, or split the file')
    yield b''.join(lines)


def _raw_lines(path: Path, where: str) -> Iterator[bytes]:
    name = path.name.lower()
    if name.endswith(('.gz', '.zst')) and not path.stat().st_size:
        raise EOFError('it is empty')  # which these formats never are
    if name.endswith('.zst'):
        yield from _zst_lines(path, where)
        return
    # isal's buffer of 512 KB, or its rest, is all that damage hides before it
    with igzip.IGzipFile(path) if name.endswith('.gz') else path.open('rb', buffering=1 << 20) as lines:
        yield from lines


def _zst_lines(path: Path, where: str) -> Iterator[bytes]:
    """The lines of a file of zstd. The program `zstd` takes over at windows that pyarrow refuses."""
    import pyarrow

    number = 0
    try:
        with io.BufferedReader(pyarrow.input_stream(str(path), compression='zstd'), 1 << 20) as lines:
            for line in lines:
                yield line
                number += 1
        return
    except OSError as error:
        if 'too much memory' not in str(error):
            raise
    try:
        process = Popen(['zstd', '-dc', '--long=31', str(path)], stdout=PIPE, stderr=PIPE)
    except FileNotFoundError:
        raise UserError(f'--source: {where} has a zstd window of more than 128 MB, which the program zstd alone reads, '
                        'and that is not installed; install it (apt install zstd), or unpack the file on another '
                        'machine (zstd -d --long=31)') from None
    with process:
        assert process.stdout and process.stderr
        yield from islice(process.stdout, number, None)
        if process.wait():
            raise EOFError(process.stderr.read().decode(errors='replace').strip())

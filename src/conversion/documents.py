"""Reads the documents of a file: JSON lines, text or Parquet, compressed or not."""

import codecs
import io
import json
import re
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, Optional

import orjson
from isal import igzip, igzip_lib

from src.common.errors import UserError
from src.conversion.source_files import TXT_ENDINGS, list_some

MAX_SHOWN = 5  # bad documents of each file that --skip_bad_docs names
MAX_TEXT = 1 << 30  # bytes in a text file that is one document
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # BOM_UTF32_LE begins with the first
# First bytes of gzip, zstd, Parquet, zip, bzip2 and xz; and zeros, which a damaged disk returns
BINARY_STARTS = (b'\x1f\x8b', b'\x28\xb5\x2f\xfd', b'PAR1\x15', b'PK\x03\x04', b'BZh91AY&SY', b'\xfd7zXZ', bytes(4))

Document = dict[str, str]


class BadDocument(NamedTuple):
    """A document that cannot be used, with the reason."""
    reason: str
    setting: str = '--source'
    holds_several: bool = False  # several documents that are not on lines of their own


def good_documents(documents: Iterable[Document | BadDocument], skip_bad_docs: bool, counts: dict[str, int],
                   max_shown: int = MAX_SHOWN) -> Iterator[Document]:
    """Yields the documents of one file that can be used.

    With `skip_bad_docs` the others are left out and counted in `counts`, and the first of them are named. Raises
    UserError if a document is bad; or, with `skip_bad_docs`, where all of several documents are bad.
    """
    good, bad, first = 0, 0, None
    for document in documents:
        if not isinstance(document, BadDocument):
            good += 1
            yield document
            continue
        if not skip_bad_docs:
            raise UserError(f'{document.setting}: {document.reason}; or leave such documents out by --skip_bad_docs')
        first = first or document
        bad += 1
        counts['bad_documents'] += 1
        if bad <= max_shown:
            print(f'skipped: {document.reason}', flush=True)
    if first and not good and (bad > 1 or first.holds_several):
        raise UserError(f'{first.setting}: {first.reason}; none of the documents of this file can be used, and '
                        '--skip_bad_docs does not leave out a whole file: repair the file, or move it away')


def read_documents(path: Path, columns: Iterable[str], text_column: str = 'text', where: Optional[str] = None,
                   txt_lines: bool = False) -> Iterator[Document | BadDocument]:
    """Yields the documents of a file in order, with `columns` as strings, or a BadDocument for one that cannot be used.

    The ending of the file's name, in small or capital letters, tells the format. The file's field `text_column` becomes
    the column `text`. With `txt_lines` each line of a text file is a document, else the whole file is one. Messages
    name the file as `where`. Raises UserError if the file is cut short or damaged, or can hold no text.
    """
    fields = {column: text_column if column == 'text' else column for column in columns}
    where, name, number = where or str(path), path.name.lower(), 0
    if name.endswith('.parquet'):
        kind, rows = 'row', _parquet_rows(path, list(fields.values()))
    elif not name.endswith(TXT_ENDINGS):
        kind, rows = 'line', _json_rows(path, where, text_column)
    else:
        kind, rows = 'line' if txt_lines else 'document', _texts(path, where, text_column, txt_lines)
    try:
        for number, row in rows:
            document = _document(row, fields, kind == 'line')
            if isinstance(document, BadDocument):
                document = document._replace(reason=f'{where}, {kind} {number} {document.reason}')
            yield document
    except UserError:
        raise
    except (OSError, EOFError, ValueError, igzip_lib.IsalError) as error:  # pyright: ignore  (its stub has an instance)
        why = f': it is cut short or damaged ({error}); download the file again'
        if isinstance(error, OSError) and error.errno:
            why = f' ({error.strerror}); correct this, then run the same command again'
        raise UserError(f'--source: {where} cannot be read after {kind} {number}{why}') from error


def _document(row: Any, fields: dict[str, str], is_line: bool) -> Document | BadDocument:
    """Makes a document of a row. `fields` maps each column to the name of its field in the file."""
    if isinstance(row, BadDocument):
        return row
    row = row if isinstance(row, dict) else dict.fromkeys(fields.values())
    if fields['text'] not in row:
        # JSON can spell names that cannot be printed
        has = list_some(list(row)).encode(errors='backslashreplace').decode()
        return BadDocument(f'has no field {fields["text"]!r}; it has: {has or "none"}', '--text_column')
    document = {column: row.get(field) for column, field in fields.items()}
    if {*map(type, document.values())} != {str}:
        try:
            document = {column: _as_text(value) for column, value in document.items()}
        except UnicodeDecodeError as error:
            return BadDocument(f'holds bytes that are not UTF-8 ({error.reason}, byte {error.start}); write the file '
                               'as UTF-8')
        wrong = [field for column, field in fields.items() if not isinstance(document[column], str)]
        if wrong:
            in_columns = is_line and isinstance(document['text'], (dict, list))  # a table that pandas wrote
            hint = "; write one object per line (df.to_json(FILE, orient='records', lines=True) does)" * in_columns
            return BadDocument(f'has no string {", ".join(wrong)}; a document is an object with the strings '
                               f'{", ".join(fields.values())}{hint}', holds_several=in_columns)
    joined = ''.join(document.values())
    if not joined.isascii():
        try:
            joined.encode()
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair
            return BadDocument('holds characters that are not Unicode text; download the file again')
    return document


def _as_text(value: Any) -> Any:
    """Turns a time or bytes from a Parquet file into a string, as C4 has it. Raises UnicodeDecodeError."""
    if isinstance(value, datetime):  # C4 has 2019-04-25T12:57:54Z
        return (value.astimezone(timezone.utc) if value.tzinfo else value).strftime('%Y-%m-%dT%H:%M:%SZ')
    return value.decode() if isinstance(value, (bytes, bytearray)) else value


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
            except UnicodeDecodeError:  # one string is bad: return bytes, which are decoded one by one
                strings, binary = {pyarrow.string(), pyarrow.large_string()}, pyarrow.large_binary()
                columns = [column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column
                           for column in batch.columns]
                columns = [column.cast(binary) if column.type in strings else column for column in columns]
                rows = pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names).to_pylist()
            yield from enumerate(rows, start=number + 1)
            number += batch.num_rows


def _json_rows(path: Path, where: str, text_column: str) -> Iterator[tuple[int, Any]]:
    first = True
    for number, line in enumerate(_lines(path, where), start=1):
        if line.isspace():
            continue
        try:
            row = orjson.loads(line)
        except ValueError:
            try:
                row = json.loads(line)  # reads NaN, half a surrogate pair, a byte order mark
            except (ValueError, RecursionError) as error:
                holds_several = 'Extra data' in str(error)
                remedy = 'write one object per line (jq -c . does), or ' if holds_several else ''
                row = BadDocument(f'is not JSON ({error}); {remedy}download the file again',
                                  holds_several=holds_several)
        is_array = isinstance(row, list) and row and (first or isinstance(row[0], dict))
        if is_array or first and isinstance(row, BadDocument) and re.match(rb'\s*\[\s*([{"]|$)', line):
            place = where if first else f'{where}, line {number}'
            raise UserError(f'--source: {place} is one JSON array; write one object per line (jq -c .[] does)')
        if first and line.strip() == b'{':
            raise UserError(f'--source: {where} is JSON over several lines; write one object per line (jq -c . does)')
        if first and isinstance(row, dict) and text_column not in row:
            for name, value in row.items():
                if isinstance(value, list) and value and isinstance(value[0], dict):
                    raise UserError(f'--source: {where} is one JSON object with a list {name!r}; write one object per '
                                    f"line (jq -c '.{name}[]' does), or, if the text is in another field, set "
                                    '--text_column')
        first = False
        yield number, row


def _texts(path: Path, where: str, text_column: str, txt_lines: bool) -> Iterator[tuple[int, Any]]:
    """Yields the lines of a text file that are not blank, or the whole file as one text."""
    lines = _lines(path, where)
    for number, text in enumerate(lines if txt_lines else _join_lines(lines, where), start=1):
        if 0 in text:
            yield number, BadDocument('holds NUL bytes: it is damaged or not UTF-8; download the file again, or write '
                                      'it as UTF-8')
        elif text.strip():
            yield number, {text_column: text.removesuffix(b'\n').removesuffix(b'\r') if txt_lines else text}


def _join_lines(lines: Iterator[bytes], where: str) -> Iterator[bytearray]:
    data = bytearray()
    for line in lines:
        data += line
        if len(data) > MAX_TEXT:
            raise UserError(f'--source: {where} has more than {MAX_TEXT:,} bytes, and would be one document; '
                            'add --txt_lines if each line is a document, or split the file')
    yield data


def _lines(path: Path, where: str) -> Iterator[bytes]:
    """Yields the lines of a file with their line ends, without the byte order mark of UTF-8."""
    name = path.name.lower()
    if name.endswith(('.gz', '.zst')) and not path.stat().st_size:
        raise EOFError('it is empty')  # a compressed file is never empty
    lines: Any
    if name.endswith('.gz'):  # damage also loses up to 512 KB before it: isal's buffer
        lines = igzip.IGzipFile(path)
    elif name.endswith('.zst'):
        import pyarrow
        lines = io.BufferedReader(pyarrow.input_stream(str(path), compression='zstd'), 1 << 20)
    else:
        lines = path.open('rb', buffering=1 << 20)
    try:
        with lines:
            for number, line in enumerate(lines):
                yield line if number else _check_first_line(line, where)
    except OSError as error:
        if 'too much memory' not in str(error):
            raise
        raise UserError(f'--source: {where} has a zstd window of more than 128 MB, which only the program zstd reads; '
                        'unpack the file (zstd -d --long=31)') from None


def _check_first_line(first: bytes, where: str) -> bytes:
    """Returns a file's first line without a byte order mark. Raises UserError if the file is not UTF-8 text."""
    if first.startswith(BINARY_STARTS):
        raise UserError(f'--source: {where} is not text: it is damaged, or its name lacks the ending of its format, '
                        'such as .gz, .zst or .parquet; rename, unpack or delete it')
    if first.startswith(UTF_16) or 0 in first[:4]:
        raise UserError(f'--source: {where} is UTF-16 or UTF-32 text; write it as UTF-8 (iconv -f UTF-16 -t UTF-8)')
    return first.removeprefix(codecs.BOM_UTF8)

"""The documents of a file: JSON lines, plain text or Parquet, as they are or compressed."""

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
from src.conversion.source_files import TXT, list_some

SHOWN = 5  # documents that --skip_bad_docs names, of each file
MAX_TEXT = 1 << 30  # bytes of a text file that is one document
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # the first is the start of UTF-32's, too
# How files begin that are gzip, zstd, Parquet, zip, bzip2 or xz, or zeros that a damaged disk gives
NOT_TEXT = (b'\x1f\x8b', b'\x28\xb5\x2f\xfd', b'PAR1\x15', b'PK\x03\x04', b'BZh91AY&SY', b'\xfd7zXZ', bytes(4))

Document = dict[str, str]


class BadDocument(NamedTuple):
    """A document that cannot be used, and why."""
    reason: str
    setting: str = '--source'
    several: bool = False  # documents that are not on lines of their own


def good_documents(found: Iterable[Document | BadDocument], skip_bad_docs: bool, counts: dict[str, int],
                   shown: int = SHOWN) -> Iterator[Document]:
    """The documents of one file that can be used.

    With `skip_bad_docs` the others are left out, counted in `counts`, and the first of them are named. Raises UserError
    where a document is bad; or, with `skip_bad_docs`, where all of several are, so that a whole file would be left out.
    """
    good, bad, first = 0, 0, None
    for document in found:
        if not isinstance(document, BadDocument):
            good += 1
            yield document
            continue
        if not skip_bad_docs:
            raise UserError(f'{document.setting}: {document.reason}; or leave such documents out with --skip_bad_docs')
        first = first or document
        bad += 1
        counts['bad_documents'] += 1
        if bad <= shown:
            print(f'skipped: {document.reason}', flush=True)
    if first and not good and (bad > 1 or first.several):
        raise UserError(f'{first.setting}: {first.reason}; none of the documents of this file can be used, and '
                        '--skip_bad_docs leaves out a document, not a file: mend the file, or move it away')


def documents(path: Path, columns: Iterable[str], text_column: str = 'text', where: Optional[str] = None,
              txt_lines: bool = False) -> Iterator[Document | BadDocument]:
    """The documents of a file in order, each with `columns` as strings. One that cannot be used is `Bad`.

    The end of the file's name, in small or capital letters, says its format. The file's field `text_column` becomes the
    column `text`. With `txt_lines` each line of a text file is a document, in place of the whole file. Messages name
    the file as `where`. Raises UserError where the file is cut short or damaged, so that what follows is lost; or where
    no document can have the text.
    """
    fields = {column: text_column if column == 'text' else column for column in columns}
    where, name, number = where or str(path), path.name.lower(), 0
    if name.endswith('.parquet'):
        kind, rows = 'row', _parquet_rows(path, list(fields.values()))
    elif not name.endswith(TXT):
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
            why = f' ({error.strerror}); mend that, then run again'
        raise UserError(f'--source: {where} cannot be read after {kind} {number}{why}') from error


def _document(row: Any, fields: dict[str, str], is_line: bool) -> Document | BadDocument:
    """The columns of a row, a JSON value (of a line) or a text, by their names in the file."""
    if isinstance(row, BadDocument):
        return row
    row = row if isinstance(row, dict) else dict.fromkeys(fields.values())
    if fields['text'] not in row:
        # JSON can spell names that cannot be printed.
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
            in_columns = is_line and isinstance(document['text'], (dict, list))  # as pandas writes a table
            hint = "; write an object a line (df.to_json(FILE, orient='records', lines=True) does)" * in_columns
            return BadDocument(f'has no string {", ".join(wrong)}; a document is an object with the strings '
                               f'{", ".join(fields.values())}{hint}', several=in_columns)
    joined = ''.join(document.values())
    if not joined.isascii():
        try:
            joined.encode()
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair
            return BadDocument('holds characters that are not Unicode text; download the file again')
    return document


def _as_text(value: Any) -> Any:
    """What C4 has as a string and Parquet may have as something else. Raises UnicodeDecodeError."""
    if isinstance(value, datetime):  # C4 has 2019-04-25T12:57:54Z
        return (value.astimezone(timezone.utc) if value.tzinfo else value).strftime('%Y-%m-%dT%H:%M:%SZ')
    return value.decode() if isinstance(value, bytes) else value


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
                row = json.loads(line)  # what the standard alone refuses: NaN, half a surrogate pair, a byte order mark
            except (ValueError, RecursionError) as error:
                several = 'Extra data' in str(error)
                mend = 'write an object a line (jq -c . does), or ' if several else ''
                row = BadDocument(f'is not JSON ({error}); {mend}download the file again', several=several)
        is_array = isinstance(row, list) and row and (first or isinstance(row[0], dict))
        if is_array or first and isinstance(row, BadDocument) and re.match(rb'\s*\[\s*([{"]|$)', line):
            what = where if first else f'{where}, line {number}'
            raise UserError(f'--source: {what} is one JSON array; write an object a line (jq -c .[] does)')
        if first and line.strip() == b'{':
            raise UserError(f'--source: {where} is JSON over several lines; write an object a line (jq -c . does)')
        if first and isinstance(row, dict) and text_column not in row:
            for name, value in row.items():
                if isinstance(value, list) and value and isinstance(value[0], dict):
                    raise UserError(f'--source: {where} is one JSON object with a list {name!r}; write an object a '
                                    f"line (jq -c '.{name}[]' does), or, if the text is in another field, set "
                                    '--text_column')
        first = False
        yield number, row


def _texts(path: Path, where: str, text_column: str, txt_lines: bool) -> Iterator[tuple[int, Any]]:
    """The lines of a text file that are not blank, or the one document that it is."""
    lines = _lines(path, where)
    for number, text in enumerate(lines if txt_lines else _whole(lines, where), start=1):
        if 0 in text:
            yield number, BadDocument('holds NUL bytes: it is damaged or not UTF-8; download the file again, or '
                                      'write it as UTF-8')
        elif text.strip():
            yield number, {text_column: text.removesuffix(b'\n').removesuffix(b'\r') if txt_lines else text}


def _whole(lines: Iterator[bytes], where: str) -> Iterator[bytes]:
    whole = bytearray()
    for line in lines:
        whole += line
        if len(whole) > MAX_TEXT:
            raise UserError(f'--source: {where} has more than {MAX_TEXT:,} bytes, and would be one document; '
                            'add --txt_lines if each line is a document, or split the file')
    yield bytes(whole)


def _lines(path: Path, where: str) -> Iterator[bytes]:
    """The lines of a file with their ends. A byte order mark of UTF-8 is left out."""
    name = path.name.lower()
    if name.endswith(('.gz', '.zst')) and not path.stat().st_size:
        raise EOFError('it is empty')  # which these formats never are
    lines: Any
    if name.endswith('.gz'):  # isal's buffer of 512 KB, or its rest, is all that damage hides before it
        lines = igzip.IGzipFile(path)
    elif name.endswith('.zst'):
        import pyarrow
        lines = io.BufferedReader(pyarrow.input_stream(str(path), compression='zstd'), 1 << 20)
    else:
        lines = path.open('rb', buffering=1 << 20)
    try:
        with lines:
            for number, line in enumerate(lines):
                yield line if number else _checked(line, where)
    except OSError as error:
        if 'too much memory' not in str(error):
            raise
        raise UserError(f'--source: {where} has a zstd window of more than 128 MB, which the program zstd alone reads; '
                        'unpack the file (zstd -d --long=31)') from None


def _checked(first: bytes, where: str) -> bytes:
    """The first line of a file without a byte order mark. Raises UserError where the file is no text in UTF-8."""
    if first.startswith(NOT_TEXT):
        raise UserError(f'--source: {where} holds no text: it is damaged, or of a format that its name does not end '
                        'in, such as .gz, .zst or .parquet; rename, unpack or delete it')
    if first.startswith(UTF_16) or 0 in first[:4]:
        raise UserError(f'--source: {where} is UTF-16 or UTF-32 text; write it as UTF-8 (iconv -f UTF-16 -t UTF-8)')
    return first.removeprefix(codecs.BOM_UTF8)

"""Reads the rows of files and file slices as records, in order, without reading ahead."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medgpt.config.base import ConfigError
from medgpt.config.data import SourceConfig
from medgpt.data.sources.deny_list import DenyList
from medgpt.data.sources.file_slices import FileSlice, list_slices
from medgpt.data.sources.files import (
    BrokenFile,
    BrokenRow,
    decode,
    is_valid,
    narrow_chunks,
    open_file,
    read_chunks,
    text_lines,
)
from medgpt.data.sources.records import Origin, Record, Reject
from medgpt.data.sources.row_formats import RowParser
from medgpt.data.sources.row_values import RawRow, json_type
from medgpt.data.sources.spreadsheets import read_spreadsheet
from medgpt.data.sources.tables import NumberedRow, read_csv

WHOLE_FILE_MB = 1024  # slice size for reading files whole
# text that is not UTF-8, the year 10000, an unknown time zone
UNREADABLE_VALUES = (ValueError, OverflowError, KeyError)
BATCH_ROWS = 256  # Parquet rows read at a time
DOCUMENT_BYTES = 64 << 20  # of a txt document; longer ones would not fit into memory
TRAILING_COMMA = re.compile(r'("(?:[^"\\]|\\.)*+")|,(?=\s*(?:[\]}]|$))')  # not in strings
JSON_LINES_PROBE = 5  # lines; pretty-printed JSON has no complete object in its first ones


def read_slice(file_slice: FileSlice, source: SourceConfig) -> Iterator[Record | Reject]:
    """Yield a record or a reject for each row of a slice. Deny-lists are not applied.

    A file that cannot be read to its end adds one reject, with row 0 if it had no readable row.

    Raises:
        ConfigError: the mapping of the source is invalid.
    """
    parse_row = RowParser(source)
    last_row = 0
    try:
        rows = read_raw_rows(file_slice, source)
        if source.group_by is not None:
            rows = iter(_group_by_column(rows, source.group_by).values())
        for number, row in rows:
            last_row = number
            origin = Origin(source=source.name, file=file_slice.file, row=number)
            bad = isinstance(row, BrokenRow)
            yield Reject.of(origin, row.reason) if bad else parse_row(row, origin)
    except BrokenFile as problem:
        origin = Origin(
            source=source.name, file=file_slice.file, row=last_row + 1 if last_row else 0
        )
        reason = f"the file cannot be read further: {problem}"
        yield Reject.of(origin, reason, unreadable=True)


def read_located_rows(paths: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("FILE row N", row) for all rows of `paths`, in the formats of training data.

    Raises:
        ConfigError: a path matches nothing, or a row or the rest of a file cannot be read.
    """
    source = SourceConfig(name="questions", paths=tuple(paths), license="only read")
    for file_slice in list_slices(source, WHOLE_FILE_MB):
        try:
            for number, row in read_raw_rows(file_slice, source):
                location = f"{file_slice.file} row {number}"
                if isinstance(row, BrokenRow):
                    raise ConfigError(f"{location}: {row.reason}; repair or remove it")
                yield location, row
        except BrokenFile as problem:
            raise ConfigError(f"{file_slice.file}: cannot be read further: {problem}") from None


def read_records(source: SourceConfig) -> Iterator[Record]:
    """Yield the records of a source that its deny-lists accept.

    Raises:
        ConfigError: a row is malformed.
    """
    deny = DenyList.load(source.deny)
    for file_slice in list_slices(source, WHOLE_FILE_MB):
        for record in read_slice(file_slice, source):
            checked = record if isinstance(record, Reject) else deny.check(record)
            if not isinstance(checked, Reject):
                yield checked
            elif checked.malformed:
                raise ConfigError(f"{checked.file} row {checked.row}: {checked.reason}")


def _group_by_column(rows: Iterable[NumberedRow], column: str) -> dict[Any, NumberedRow]:
    """Group rows by `column`, each group under the number of its first row. Keeps broken rows."""
    groups: dict[Any, NumberedRow] = {}
    for number, row in rows:
        if isinstance(row, BrokenRow):
            groups[number] = (number, row)
        elif not isinstance(row.get(column), (str, int)):
            actual = json_type(row[column]) if column in row else "missing"
            bad_row = BrokenRow(
                f"column {column} is {actual}, must be text or a number to group by"
            )
            groups[number] = (number, bad_row)
        else:
            _, first = groups.setdefault(("", row[column]), (number, {**row, "rows": []}))
            assert isinstance(first, dict)
            first["rows"].append(row)
    return groups


def read_raw_rows(file_slice: FileSlice, source: SourceConfig) -> Iterator[NumberedRow]:
    """Yield rows with their numbers. Raises BrokenFile after the last row that could be read."""
    if file_slice.format == "parquet":
        return _read_parquet(file_slice, source)
    if file_slice.format == "xlsx":
        return read_spreadsheet(b"".join(read_chunks(file_slice.file)), source.sheet)
    stored = read_chunks(file_slice.file, file_slice.start, file_slice.stop)
    chunks, encoding = narrow_chunks(stored, file_slice.encoding)
    lines = text_lines(chunks, encoding)
    match file_slice.format:
        case "jsonl":
            return _read_lines(lines, file_slice.first_row, _json_row)
        case "json":
            return _read_json(iter(chunks), encoding)
        case "csv":
            return read_csv(lines, source.delimiter)
        case "tsv":
            return read_csv(lines, "\t" if source.delimiter == "auto" else source.delimiter)
        case "txt" if source.lines:
            return _read_lines(lines, file_slice.first_row, _text_row)
        case "txt":
            return _read_txt(chunks, encoding)
    raise AssertionError(file_slice.format)


def _read_lines(
    lines: Iterable[str | BrokenRow], first_row: int, parse: Callable[[str], RawRow | BrokenRow]
) -> Iterator[NumberedRow]:
    """One row per line; blank lines count, but are no rows."""
    for number, line in enumerate(lines, start=first_row):
        if isinstance(line, BrokenRow):
            yield number, line
        elif line.strip():
            yield number, parse(line)


def _text_row(text: str) -> RawRow:
    return {"text": text}


def _json_row(line: str) -> RawRow | BrokenRow:
    try:
        return _require_object(_load_json(line))
    except BrokenFile as problem:
        return BrokenRow(str(problem))


def _load_json(text: str) -> Any:
    """Parse a JSON text, or raise BrokenFile with a message that does not quote it.

    Commas before a closing bracket and after the text are no error.
    """
    try:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return json.loads(TRAILING_COMMA.sub(lambda match: match[1] or "", text))
    except json.JSONDecodeError as error:
        raise BrokenFile(f"is not JSON from character {error.pos + 1} on") from None
    except (ValueError, RecursionError) as error:
        raise BrokenFile(f"is JSON that Python cannot hold ({type(error).__name__})") from None


def _require_object(value: Any) -> RawRow | BrokenRow:
    if isinstance(value, dict):
        return value
    return BrokenRow(f"row is {json_type(value)}, must be an object")


def _read_txt(chunks: Iterable[bytes], encoding: str) -> Iterator[NumberedRow]:
    """Yield the text as one document, cut at line ends if it is longer than DOCUMENT_BYTES."""
    number, pending = 1, bytearray()
    for chunk in chunks:
        pending += chunk
        if len(pending) > DOCUMENT_BYTES and (cut := pending.rfind(b"\n") + 1):
            yield number, _document_row(bytes(pending[:cut]), encoding)
            number += 1
            del pending[:cut]
    if pending or number == 1:
        yield number, _document_row(bytes(pending), encoding)


def _document_row(data: bytes, encoding: str) -> RawRow | BrokenRow:
    text = decode(data, encoding)
    return text if isinstance(text, BrokenRow) else _text_row(text.removeprefix("\ufeff"))


def _read_json(chunks: Iterator[bytes], encoding: str) -> Iterator[NumberedRow]:
    """Read an array of rows, loaded whole, or JSON lines in a file named .json."""
    head = b""
    for chunk in chunks:
        head += chunk
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            break
        if head.count(b"\n") > JSON_LINES_PROBE:
            break
    chunks = chain([head], chunks)
    if _is_json_lines(head, encoding):
        return _read_lines(text_lines(chunks, encoding), 1, _json_row)
    return _read_json_array(chunks, encoding)


def _is_json_lines(head: bytes, encoding: str) -> bool:
    lines = [line for line in head.split(b"\n")[: 2 * JSON_LINES_PROBE] if line.strip()]
    texts = [decode(line, encoding) for line in lines[:JSON_LINES_PROBE]]
    # in an array an object has a comma after it, and so may a line
    first = next((text for text in texts if isinstance(text, str)), "").lstrip("\ufeff \t\r")
    ends = ("}", "}," if first.startswith("{") else "}")
    return any(
        isinstance(text, str)
        and text.rstrip().endswith(ends)
        and isinstance(_json_row(text.lstrip("\ufeff")), dict)
        for text in texts
    )


def _read_json_array(chunks: Iterable[bytes], encoding: str) -> Iterator[NumberedRow]:
    data = b"".join(chunks)
    text = data.decode(encoding, "surrogateescape")  # keeps the rows without broken bytes
    checked = encoding != "utf-8" or not is_valid(data, encoding)
    value = _load_json(text.removeprefix("\ufeff"))
    for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
        problem = _encoding_problem(row, encoding) if checked else None
        yield number, problem or _require_object(row)


def _encoding_problem(row: object, encoding: str) -> BrokenRow | None:
    """Return why a row of a JSON array has broken bytes or another encoding, or None."""
    text = json.dumps(row, ensure_ascii=False)
    if any("\udc80" <= character <= "\udcff" for character in text):
        return BrokenRow(f"broken encoding (read as {encoding})")
    problem = decode(text.encode(encoding, "ignore"), encoding)
    return problem if isinstance(problem, BrokenRow) else None


def _read_parquet(file_slice: FileSlice, source: SourceConfig) -> Iterator[NumberedRow]:
    number = file_slice.first_row
    with open_file(file_slice.file) as stream:
        try:
            file = pq.ParquetFile(stream)
            columns = _useful_columns(file.schema_arrow, source)
            groups = range(file_slice.start, file_slice.stop or file.metadata.num_row_groups)
            batches = (
                file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns)
                for group in groups
            )
            for batch in chain.from_iterable(batches):
                for row in _batch_rows(batch):
                    yield number, row
                    number += 1
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # an error of the file system, not of the format
            raise BrokenFile("damaged Parquet data") from None


def _useful_columns(schema: pa.Schema, source: SourceConfig) -> list[str]:
    """Return the columns without the dates and times that no template names.

    No kind of row has them, and Python cannot hold all that Parquet can.
    """
    mapping = "" if source.mapping is None else source.mapping.model_dump_json()
    named = set(re.findall(r"\w+", mapping)) | {source.group_by}
    dates = {name for name in schema.names if pa.types.is_temporal(schema.field(name).type)}
    unused = set() if "row" in named else dates - named
    return [name for name in schema.names if name not in unused]


def _batch_rows(batch: pa.RecordBatch) -> Iterator[RawRow | BrokenRow]:
    try:
        yield from batch.to_pylist()
    except UNREADABLE_VALUES:
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield BrokenRow(f"broken encoding at byte {error.start + 1}")
            except UNREADABLE_VALUES:
                yield BrokenRow("has a date or time that Python cannot hold")

"""Reads the rows of files and file slices as records, in order, without reading ahead."""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
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
    open_file,
    read_all,
    read_chunks,
    text_lines,
)
from medgpt.data.sources.records import Origin, Record, Reject
from medgpt.data.sources.row_formats import RowParser
from medgpt.data.sources.turns import RawRow, json_type

WHOLE_FILE_MB = 1024  # slice size for reading files whole
BATCH_ROWS = 256  # Parquet rows read at a time
JSON_LINES_PROBE = 5  # lines; pretty-printed JSON has no complete object in its first ones
csv.field_size_limit(1 << 24)  # characters: fits whole documents, bounds an unclosed quote

NumberedRow = tuple[int, RawRow | BrokenRow]


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
            yield (
                _make_reject(origin, row.reason)
                if isinstance(row, BrokenRow)
                else parse_row(row, origin)
            )
    except BrokenFile as problem:
        origin = Origin(
            source=source.name, file=file_slice.file, row=last_row + 1 if last_row else 0
        )
        reason = f"the file cannot be read further: {problem}"
        yield _make_reject(origin, reason, unreadable=True)


def read_located_rows(paths: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("FILE row N", row) for all rows of `paths`, in the formats of training data.

    Raises:
        ConfigError: a path matches nothing, or a row or the rest of a file cannot be read.
    """
    source = SourceConfig(name="questions", paths=tuple(paths), licence="only read")
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


def _make_reject(origin: Origin, reason: str, *, unreadable: bool = False) -> Reject:
    return Reject(
        source=origin.source,
        file=origin.file,
        row=origin.row,
        reason=reason,
        unreadable=unreadable,
    )


def read_raw_rows(file_slice: FileSlice, source: SourceConfig) -> Iterator[NumberedRow]:
    """Yield rows with their numbers. Raises BrokenFile after the last row that could be read."""
    if file_slice.format == "parquet":
        return _read_parquet(file_slice)
    chunks = read_chunks(file_slice.file, file_slice.start, file_slice.stop)
    match file_slice.format:
        case "jsonl":
            return _read_json_lines(text_lines(chunks, file_slice.encoding), file_slice.first_row)
        case "json":
            return _read_json(chunks, file_slice)
        case "csv" | "tsv":
            delimiter = "," if file_slice.format == "csv" else "\t"
            return _read_csv(text_lines(chunks, file_slice.encoding), delimiter)
        case "txt" if source.lines:
            return _read_txt_lines(text_lines(chunks, file_slice.encoding), file_slice.first_row)
        case "txt":
            return _read_txt(chunks, file_slice.encoding)
    raise AssertionError(file_slice.format)


def _read_txt_lines(lines: Iterable[str | BrokenRow], first_row: int) -> Iterator[NumberedRow]:
    for number, line in enumerate(lines, start=first_row):
        if isinstance(line, BrokenRow):
            yield number, line
        elif line.strip():
            yield number, {"text": line}


def _read_txt(chunks: Iterable[bytes], encoding: str) -> Iterator[NumberedRow]:
    data, encoding = read_all(chunks, encoding)
    text = decode(data, encoding)
    yield 1, text if isinstance(text, BrokenRow) else {"text": text.removeprefix("\ufeff")}


def _read_json_lines(lines: Iterable[str | BrokenRow], first_row: int) -> Iterator[NumberedRow]:
    for number, line in enumerate(lines, start=first_row):
        if isinstance(line, BrokenRow):
            yield number, line
        elif line.strip():
            yield number, _parse_json(line)


def _parse_json(line: str) -> RawRow | BrokenRow:
    try:
        return _require_object(json.loads(line))
    except json.JSONDecodeError as error:
        return BrokenRow(f"is not JSON from character {error.pos + 1} on")
    except (ValueError, RecursionError) as error:
        return BrokenRow(f"is JSON that Python cannot hold ({type(error).__name__})")


def _require_object(value: Any) -> RawRow | BrokenRow:
    return (
        value
        if isinstance(value, dict)
        else BrokenRow(f"row is {json_type(value)}, must be an object")
    )


def _read_json(chunks: Iterator[bytes], file_slice: FileSlice) -> Iterator[NumberedRow]:
    """Read an array of rows, loaded whole, or JSON lines in a file named .json."""
    head = b""
    for chunk in chunks:
        head += chunk
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            break
        if head.count(b"\n") > JSON_LINES_PROBE:
            break
    chunks = chain([head], chunks)
    if _is_json_lines(head):
        return _read_json_lines(text_lines(chunks, file_slice.encoding), 1)
    return _read_json_array(chunks, file_slice.encoding)


def _is_json_lines(head: bytes) -> bool:
    lines = [line for line in head.split(b"\n")[: 2 * JSON_LINES_PROBE] if line.strip()][
        :JSON_LINES_PROBE
    ]
    text = [decode(line, "utf-8") for line in lines]
    return any(
        isinstance(line, str) and isinstance(_parse_json(line.lstrip("\ufeff")), dict)
        for line in text
    )


def _read_json_array(chunks: Iterable[bytes], encoding: str) -> Iterator[NumberedRow]:
    data, encoding = read_all(chunks, encoding)
    text = decode(data, encoding)
    broken = isinstance(text, BrokenRow)
    if isinstance(text, BrokenRow):  # keep the rows without broken bytes
        text = data.decode(encoding, "surrogateescape")
    try:
        value = json.loads(text.removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        raise BrokenFile(f"is not JSON from character {error.pos + 1} on") from None
    except (ValueError, RecursionError) as error:
        raise BrokenFile(f"is JSON that Python cannot hold ({type(error).__name__})") from None
    for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
        if broken and _has_broken_bytes(row):
            yield number, BrokenRow(f"broken encoding (read as {encoding})")
        else:
            yield number, _require_object(row)


def _has_broken_bytes(row: object) -> bool:
    text = json.dumps(row, ensure_ascii=False)
    return any("\udc80" <= character <= "\udcff" for character in text)


def _read_csv(lines: Iterable[str | BrokenRow], delimiter: str) -> Iterator[NumberedRow]:
    """Read CSV rows, numbered by row and not by line because cells may hold line breaks."""
    broken: list[BrokenRow] = []  # undecodable lines of the current row
    reader = csv.reader(_csv_lines(lines, broken), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    number = 0
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            cells, problem = [], BrokenRow(f"is not CSV: {error}")
        else:
            problem = None
        if cells is None:
            return
        problem = broken[0] if broken else problem
        broken.clear()
        if not cells and problem is None:
            continue  # a blank line
        if header is None:
            if problem:
                raise BrokenFile(f"the header {problem.reason}")
            if len(set(cells)) < len(cells):
                raise BrokenFile("the header names a column twice")
            header = cells
            continue
        number += 1
        if problem is None and len(cells) != len(header):
            problem = BrokenRow(f"has {len(cells)} cells, the header {len(header)}")
        yield number, problem or dict(zip(header, cells, strict=True))


def _csv_lines(lines: Iterable[str | BrokenRow], broken: list[BrokenRow]) -> Iterator[str]:
    for line in lines:
        if isinstance(line, BrokenRow):
            broken.append(line)
            yield "broken\n"  # placeholder, so that the csv reader continues
        else:
            yield line + "\n"


def _read_parquet(file_slice: FileSlice) -> Iterator[NumberedRow]:
    number = file_slice.first_row
    with open_file(file_slice.file) as stream:
        try:
            file = pq.ParquetFile(stream)
            groups = range(file_slice.start, file_slice.stop or file.metadata.num_row_groups)
            batches = (file.iter_batches(BATCH_ROWS, row_groups=[group]) for group in groups)
            for batch in chain.from_iterable(batches):
                for row in _batch_rows(batch):
                    yield number, row
                    number += 1
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # an error of the file system, not of the format
            raise BrokenFile("damaged Parquet data") from None


def _batch_rows(batch: pa.RecordBatch) -> Iterator[RawRow | BrokenRow]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield BrokenRow(f"broken encoding at byte {error.start + 1}")

"""The rows of a unit as records: one record or reject for each, in order, without reading ahead."""

import csv
import json
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medgpt.config.data import SourceConfig
from medgpt.data.sources.files import (
    Broken,
    BrokenFile,
    decode,
    open_file,
    read_chunks,
    text_lines,
    whole,
)
from medgpt.data.sources.records import Origin, Record, Reject
from medgpt.data.sources.row_formats import Recogniser
from medgpt.data.sources.turns import Row, kind_of
from medgpt.data.sources.units import Unit

BATCH_ROWS = 256  # of Parquet at a time
PEEK_LINES = 5  # pretty-printed JSON has no complete object in its first lines
csv.field_size_limit(1 << 24)  # characters; whole documents are cells, an unclosed quote still ends

NumberedRow = tuple[int, Row | Broken]


def read_unit(unit: Unit, source: SourceConfig) -> Iterator[Record | Reject]:
    """Records and rejects of a unit's rows; deny-lists are applied by `DenyList.check`.

    A file that cannot be read to its end gives one reject more, as row 0 if it gave no row.

    Raises:
        ConfigError: the source's mapping is wrong.
    """
    recognise = Recogniser(source)
    last = 0
    try:
        rows = read_rows(unit, source)
        if source.group_by is not None:
            rows = iter(_grouped(rows, source.group_by).values())
        for number, row in rows:
            last = number
            origin = Origin(source=source.name, file=unit.file, row=number)
            yield _reject(origin, row.reason) if isinstance(row, Broken) else recognise(row, origin)
    except BrokenFile as problem:
        origin = Origin(source=source.name, file=unit.file, row=last + 1 if last else 0)
        reason = f"the file cannot be read further: {problem}"
        yield _reject(origin, reason, unreadable=True)


def _grouped(rows: Iterable[NumberedRow], column: str) -> dict[Any, NumberedRow]:
    """Rows with one value in `column` under the number of the first; others as they are."""
    groups: dict[Any, NumberedRow] = {}
    for number, row in rows:
        if isinstance(row, Broken):
            groups[number] = (number, row)
        elif not isinstance(row.get(column), (str, int)):
            found = kind_of(row[column]) if column in row else "missing"
            broken = Broken(f"column {column} is {found}, must be text or a number to group by")
            groups[number] = (number, broken)
        else:
            _, first = groups.setdefault(("", row[column]), (number, {**row, "rows": []}))
            assert isinstance(first, dict)
            first["rows"].append(row)
    return groups


def _reject(origin: Origin, reason: str, *, unreadable: bool = False) -> Reject:
    return Reject(
        source=origin.source,
        file=origin.file,
        row=origin.row,
        reason=reason,
        unreadable=unreadable,
    )


def read_rows(unit: Unit, source: SourceConfig) -> Iterator[NumberedRow]:
    """Raw rows with their numbers. Raises BrokenFile after the last row that could be read."""
    if unit.format == "parquet":
        return _parquet(unit)
    chunks = read_chunks(unit.file, unit.start, unit.stop)
    match unit.format:
        case "jsonl":
            return _json_lines(text_lines(chunks, unit.encoding), unit.first_row)
        case "json":
            return _json(chunks, unit)
        case "csv" | "tsv":
            delimiter = "," if unit.format == "csv" else "\t"
            return _csv(text_lines(chunks, unit.encoding), delimiter)
        case "txt" if source.lines:
            return _txt_lines(text_lines(chunks, unit.encoding), unit.first_row)
        case "txt":
            return _txt(chunks, unit.encoding)
    raise AssertionError(unit.format)


def _txt_lines(lines: Iterable[str | Broken], first_row: int) -> Iterator[NumberedRow]:
    for number, line in enumerate(lines, start=first_row):
        if isinstance(line, Broken):
            yield number, line
        elif line.strip():
            yield number, {"text": line}


def _txt(chunks: Iterable[bytes], encoding: str) -> Iterator[NumberedRow]:
    data, encoding = whole(chunks, encoding)
    text = decode(data, encoding)
    yield 1, text if isinstance(text, Broken) else {"text": text.removeprefix("\ufeff")}


def _json_lines(lines: Iterable[str | Broken], first_row: int) -> Iterator[NumberedRow]:
    for number, line in enumerate(lines, start=first_row):
        if isinstance(line, Broken):
            yield number, line
        elif line.strip():
            yield number, _parse(line)


def _parse(line: str) -> Row | Broken:
    try:
        return _object(json.loads(line))
    except json.JSONDecodeError as error:
        return Broken(f"is not JSON from character {error.pos + 1} on")
    except (ValueError, RecursionError) as error:
        return Broken(f"is JSON that Python cannot hold ({type(error).__name__})")


def _object(value: Any) -> Row | Broken:
    return (
        value if isinstance(value, dict) else Broken(f"row is {kind_of(value)}, must be an object")
    )


def _json(chunks: Iterator[bytes], unit: Unit) -> Iterator[NumberedRow]:
    """An array of rows, loaded whole, or JSON lines under the name .json."""
    head = b""
    for chunk in chunks:
        head += chunk
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            break
        if head.count(b"\n") > PEEK_LINES:
            break
    chunks = chain([head], chunks)
    if _is_json_lines(head):
        return _json_lines(text_lines(chunks, unit.encoding), 1)
    return _json_array(chunks, unit.encoding)


def _is_json_lines(head: bytes) -> bool:
    lines = [line for line in head.split(b"\n")[: 2 * PEEK_LINES] if line.strip()][:PEEK_LINES]
    text = [decode(line, "utf-8") for line in lines]
    return any(
        isinstance(line, str) and isinstance(_parse(line.lstrip("\ufeff")), dict) for line in text
    )


def _json_array(chunks: Iterable[bytes], encoding: str) -> Iterator[NumberedRow]:
    data, encoding = whole(chunks, encoding)
    text = decode(data, encoding)
    broken = isinstance(text, Broken)
    if isinstance(text, Broken):  # must not cost the rows that are whole
        text = data.decode(encoding, "surrogateescape")
    try:
        value = json.loads(text.removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        raise BrokenFile(f"is not JSON from character {error.pos + 1} on") from None
    except (ValueError, RecursionError) as error:
        raise BrokenFile(f"is JSON that Python cannot hold ({type(error).__name__})") from None
    for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
        if broken and _has_broken_bytes(row):
            yield number, Broken(f"broken encoding (read as {encoding})")
        else:
            yield number, _object(row)


def _has_broken_bytes(row: object) -> bool:
    text = json.dumps(row, ensure_ascii=False)
    return any("\udc80" <= character <= "\udcff" for character in text)


def _csv(lines: Iterable[str | Broken], delimiter: str) -> Iterator[NumberedRow]:
    """Cells may hold line breaks, so a row is known by its number and not by its line."""
    broken: list[Broken] = []  # lines of the row that is being read
    reader = csv.reader(_csv_lines(lines, broken), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    number = 0
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            cells, problem = [], Broken(f"is not CSV: {error}")
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
            problem = Broken(f"has {len(cells)} cells, the header {len(header)}")
        yield number, problem or dict(zip(header, cells, strict=True))


def _csv_lines(lines: Iterable[str | Broken], broken: list[Broken]) -> Iterator[str]:
    for line in lines:
        if isinstance(line, Broken):
            broken.append(line)
            yield "broken\n"  # keeps the reader going
        else:
            yield line + "\n"


def _parquet(unit: Unit) -> Iterator[NumberedRow]:
    number = unit.first_row
    with open_file(unit.file) as stream:
        try:
            file = pq.ParquetFile(stream)
            groups = range(unit.start, unit.stop or file.metadata.num_row_groups)
            batches = (file.iter_batches(BATCH_ROWS, row_groups=[group]) for group in groups)
            for batch in chain.from_iterable(batches):
                for row in _batch_rows(batch):
                    yield number, row
                    number += 1
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the system's, not the format's
            raise BrokenFile("damaged Parquet data") from None


def _batch_rows(batch: pa.RecordBatch) -> Iterator[Row | Broken]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield Broken(f"broken encoding at byte {error.start + 1}")

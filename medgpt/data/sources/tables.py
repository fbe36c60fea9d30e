"""Reads CSV, and names the cells of rows by the header of their table."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

from medgpt.data.sources.files import BrokenFile, BrokenRow
from medgpt.data.sources.row_values import RawRow

NumberedRow = tuple[int, RawRow | BrokenRow]
Cells = list[str] | BrokenRow

DELIMITERS = (",", "\t", ";", "|", "，", "；")  # the first of equally good ones is taken
SNIFFED_LINES = 100
csv.field_size_limit(1 << 24)  # characters: fits whole documents, bounds an unclosed quote


def read_csv(lines: Iterable[str | BrokenRow], delimiter: str) -> Iterator[NumberedRow]:
    """Yield CSV rows, numbered by row and not by line because cells may hold line breaks.

    `delimiter` is a character, or `auto` to find it in the first lines.
    """
    lines = iter(lines)
    head = list(islice(lines, SNIFFED_LINES))
    first = head[0] if head else ""
    if isinstance(first, str) and first.lower().startswith("sep=") and len(first) == 5:
        delimiter = first[4] if delimiter == "auto" else delimiter  # Excel writes this line
        del head[0]
    if delimiter == "auto":
        delimiter = sniff_delimiter([line for line in head if isinstance(line, str)])
    return named_rows(_csv_cells(chain(head, lines), delimiter))


def sniff_delimiter(lines: Sequence[str]) -> str:
    """Return the delimiter with which most rows have as many cells as the header, if several."""
    return max(DELIMITERS, key=lambda delimiter: _regular_share(lines, delimiter))


def _regular_share(lines: Sequence[str], delimiter: str) -> float:
    rows = [row for row in _csv_cells(lines, delimiter) if not isinstance(row, BrokenRow)]
    if not rows or len(rows[0]) < 2:
        return 0.0
    return sum(len(row) == len(rows[0]) for row in rows) / len(rows)


def named_rows(rows: Iterator[Cells]) -> Iterator[NumberedRow]:
    """Yield the rows of a table by the names in its first row that is not empty.

    A row of empty cells counts, but is no row. A cell under an empty header is `column N`.
    """
    header = next((row for row in rows if isinstance(row, BrokenRow) or any(map(_text, row))), [])
    if isinstance(header, BrokenRow):
        raise BrokenFile(f"the header {header.reason}")
    names = _column_names(header)
    for number, cells in enumerate(rows, start=1):
        if isinstance(cells, BrokenRow):
            yield number, cells
        elif any(map(_text, cells)):
            yield number, _named(cells, header, names)


def _column_names(header: Sequence[str]) -> list[str]:
    names = [name if _text(name) else f"column {n}" for n, name in enumerate(header, start=1)]
    for number, name in enumerate(names, start=1):
        if (first := names.index(name) + 1) < number:
            raise BrokenFile(f"the header names a column twice (columns {first} and {number})")
    return names


def _named(cells: list[str], header: Sequence[str], names: Sequence[str]) -> RawRow | BrokenRow:
    """Return a row by column, without empty cells under an empty header."""
    while len(cells) > len(names) and not _text(cells[-1]):
        cells = cells[:-1]
    if len(cells) != len(names):
        return BrokenRow(f"has {len(cells)} cells, the header {len(names)}")
    columns = zip(names, header, cells, strict=True)
    return {name: cell for name, title, cell in columns if _text(title) or _text(cell)}


def _text(cell: str) -> str:
    return cell.strip()


def _csv_cells(lines: Iterable[str | BrokenRow], delimiter: str) -> Iterator[Cells]:
    """Yield the cells of each row that is not blank."""
    broken: list[BrokenRow] = []  # undecodable lines of the current row

    def readable() -> Iterator[str]:
        for line in lines:
            if isinstance(line, BrokenRow):
                broken.append(line)
            yield "broken\n" if isinstance(line, BrokenRow) else line + "\n"

    reader = csv.reader(readable(), delimiter=delimiter, strict=True)
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            cells = BrokenRow(f"is not CSV: {error}")
        if cells is None:
            return
        if broken:
            cells = broken[0]
            broken.clear()
        if cells:
            yield cells

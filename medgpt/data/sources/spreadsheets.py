"""Reads one sheet of an Excel or OpenDocument file as a table of texts."""

import re
import zipfile
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from io import BytesIO
from typing import NamedTuple
from xml.etree import ElementTree

from python_calamine import CalamineError, CalamineSheet, CalamineWorkbook, SheetVisibleEnum

from medgpt.data.sources.files import BrokenFile, BrokenRow
from medgpt.data.sources.tables import Cells, NumberedRow, named_rows

ENCRYPTED = "EncryptedPackage".encode("utf-16-le")  # a stream of a password-protected file
RELATION = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}id"
# cells of xlsx without a value that a reader could use
NO_VALUE = re.compile(
    rb'<c r="([A-Z]+)(\d+)"(?:[^>]* t="e"[^>]*>'
    rb'|(?![^>]*t="str")[^>]*>\s*(?:<f[^>]*/>|<f[^>]*>[^<]*</f>)\s*(?:<v\s*/>|<v></v>)?\s*</c>)'
)


class SheetError(Exception):
    """The sheet to read is not clear, or the file is no spreadsheet. Never quotes cells."""


class Sheet(NamedTuple):
    """A sheet, and the cells that have no value, by row from 1."""

    content: CalamineSheet
    valueless: dict[int, str]


def open_sheet(data: bytes, name: str | None) -> Sheet | None:
    """Return the sheet called `name`, or the only one that is not empty; None if all are empty.

    Raises:
        SheetError: the file cannot be opened, there is no such sheet, or several have cells.
    """
    if ENCRYPTED in data:
        raise SheetError("the file is password-protected; save it without a password")
    try:
        book = CalamineWorkbook.from_filelike(BytesIO(data))
        sheets = {title: book.get_sheet_by_name(title) for title in book.sheet_names}
    except (CalamineError, zipfile.BadZipFile, OSError) as error:
        raise SheetError(f"not a readable spreadsheet ({type(error).__name__})") from None
    filled = [title for title, sheet in sheets.items() if sheet.height]
    visible = {sheet.name: sheet.visible for sheet in book.sheets_metadata}
    titles = ", ".join(
        repr(title) + ("" if visible[title] is SheetVisibleEnum.Visible else " (hidden)")
        for title in filled
    )
    if name is None and len(filled) > 1:
        raise SheetError(f"{len(filled)} sheets have cells: {titles}; set sheet to one of them")
    if name is not None and name not in sheets:
        raise SheetError(f"there is no sheet {name!r}, only {titles}")
    title = name or next(iter(filled), None)
    return None if title is None else Sheet(sheets[title], _valueless_cells(data, title))


def read_spreadsheet(data: bytes, name: str | None) -> Iterator[NumberedRow]:
    """Yield the rows of a sheet below its header, all cells as text. Raises BrokenFile."""
    try:
        sheet = open_sheet(data, name)
    except SheetError as problem:
        raise BrokenFile(str(problem)) from None
    return iter(()) if sheet is None else named_rows(_rows(sheet))


def _rows(sheet: Sheet) -> Iterator[Cells]:
    """Yield the rows. All cells of a merged range have its value."""
    rows = sheet.content.to_python(skip_empty_area=False)
    for (top, left), (bottom, right) in sheet.content.merged_cell_ranges or []:
        for row in rows[top : bottom + 1]:
            row[left : right + 1] = [rows[top][left]] * (right + 1 - left)
    for number, row in enumerate(rows, start=1):
        if number in sheet.valueless:
            cell = f"{sheet.valueless[number]}{number}"
            yield BrokenRow(f"cell {cell} is an error, or a formula without a stored value")
        else:
            yield [_as_text(value) for value in row]


def _as_text(value: object) -> str:
    """Return a cell as Excel shows it in its general format; dates as in ISO 8601."""
    match value:
        case str():
            return value
        case bool():
            return str(value).upper()
        case int() | float():
            return format(value, ".15g") if value != int(value) else str(int(value))
        case datetime():
            return value.isoformat(" ", "seconds")
        case date() | time():
            return value.isoformat()
        case timedelta():
            return str(value)
    raise AssertionError(type(value))


def _valueless_cells(data: bytes, title: str) -> dict[int, str]:
    """Return the column of a cell without a usable value by row; empty for other files than xlsx.

    A program that writes formulas without computing them leaves them without a value, which the
    reader returns as an empty cell. So it does with errors such as #N/A.
    """
    if not zipfile.is_zipfile(BytesIO(data)):
        return {}
    with zipfile.ZipFile(BytesIO(data)) as archive:
        if "xl/workbook.xml" not in archive.namelist():
            return {}
        book = ElementTree.fromstring(archive.read("xl/workbook.xml"))
        relations = ElementTree.fromstring(archive.read("xl/_rels/workbook.xml.rels"))
        targets = {relation.get("Id"): relation.get("Target", "") for relation in relations}
        found = (e for e in book.iter() if e.tag.endswith("}sheet") and e.get("name") == title)
        target = targets[next(found).get(RELATION)]
        path = target.lstrip("/") if target.startswith("/") else f"xl/{target}"
        return {int(row): column.decode() for column, row in NO_VALUE.findall(archive.read(path))}

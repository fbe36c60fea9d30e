"""Writes small xlsx files by hand, as programs write them that compute no formulas."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"
Cell = str | int | float | bool | None
"""Text, number or truth; a text that begins with < is XML inside the element of the cell."""


def write_xlsx(
    path: Path,
    sheets: Mapping[str, Sequence[Sequence[Cell]]],
    *,
    hidden: Sequence[str] = (),
    merged: str = "",
) -> Path:
    """Write `sheets` by name; `merged` is a range of the first one, such as A2:A3."""
    merge = f'<mergeCells><mergeCell ref="{merged}"/></mergeCells>' if merged else ""
    with zipfile.ZipFile(path, "w") as archive:
        write = archive.writestr
        parts = [f"/xl/worksheets/sheet{n}.xml" for n in range(1, len(sheets) + 1)]
        kind = "application/vnd.openxmlformats-officedocument.spreadsheetml"
        overrides = "".join(
            f'<Override PartName="{part}" ContentType="{kind}.worksheet+xml"/>' for part in parts
        )
        write(
            "[Content_Types].xml",
            f'<Types xmlns="{PACKAGE}/content-types"><Override PartName="/xl/workbook.xml" '
            f'ContentType="{kind}.sheet.main+xml"/>{overrides}</Types>',
        )
        write(
            "_rels/.rels",
            f'<Relationships xmlns="{PACKAGE}/relationships"><Relationship Id="rId1" '
            f'Type="{OFFICE}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        )
        states = ("visible", "hidden")
        entries = "".join(
            f'<sheet name="{name}" sheetId="{n}" r:id="rId{n}" state="{states[name in hidden]}"/>'
            for n, name in enumerate(sheets, start=1)
        )
        write(
            "xl/workbook.xml",
            f'<workbook xmlns="{MAIN}" xmlns:r="{OFFICE}"><sheets>{entries}</sheets></workbook>',
        )
        relations = "".join(
            f'<Relationship Id="rId{n}" Type="{OFFICE}/worksheet" Target="{part}"/>'
            for n, part in enumerate(parts, start=1)
        )
        styles = f'<Relationship Id="rId0" Type="{OFFICE}/styles" Target="styles.xml"/>'
        write(
            "xl/_rels/workbook.xml.rels",
            f'<Relationships xmlns="{PACKAGE}/relationships">{relations}{styles}</Relationships>',
        )
        write(
            "xl/styles.xml",  # style 1 is a date
            f'<styleSheet xmlns="{MAIN}"><cellXfs count="2"><xf numFmtId="0"/><xf numFmtId="14"/>'
            "</cellXfs></styleSheet>",
        )
        for number, (part, rows) in enumerate(zip(parts, sheets.values(), strict=True)):
            content = "".join(
                f'<row r="{r}">'
                + "".join(_cell(f"{chr(65 + c)}{r}", v) for c, v in enumerate(row))
                + "</row>"
                for r, row in enumerate(rows, start=1)
            )
            write(
                part[1:],
                f'<worksheet xmlns="{MAIN}"><sheetData>{content}</sheetData>'
                f"{merge if not number else ''}</worksheet>",
            )
    return path


def date(serial: float) -> str:
    """Return the cell of a date: days since 1899-12-30."""
    return f"<DATE><v>{serial}</v>"


def _cell(place: str, value: Cell) -> str:
    match value:
        case None:
            return ""
        case bool():
            return f'<c r="{place}" t="b"><v>{int(value)}</v></c>'
        case int() | float():
            return f'<c r="{place}"><v>{value!r}</v></c>'
        case str() if value.startswith("<DATE>"):
            return f'<c r="{place}" s="1">{value.removeprefix("<DATE>")}</c>'
        case str() if value.startswith("<ERROR>"):
            return f'<c r="{place}" t="e"><v>#N/A</v></c>'
        case str() if value.startswith("<"):
            return f'<c r="{place}">{value}</c>'
        case str():
            return f'<c r="{place}" t="inlineStr"><is><t>{escape(value)}</t></is></c>'

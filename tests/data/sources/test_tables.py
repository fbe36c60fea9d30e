"""Tables as users export them: CSV of every delimiter, spreadsheets, JSON with extra commas."""

import json
from pathlib import Path
from typing import Any

import pytest

from medgpt.config.base import ConfigError
from medgpt.config.data import SourceConfig
from medgpt.data.sources.file_slices import list_slices
from medgpt.data.sources.files import BrokenFile, BrokenRow
from medgpt.data.sources.readers import read_raw_rows
from tests.data.sources.xlsx import Cell, date, write_xlsx

HEADER = ["question", "answer"]
ROWS = [["发烧, 怎么办; 急", 'say "no"'], ["两\n行", "b|c"], ["三", "四"]]


def rows(file: Path, **changes: object) -> list[tuple[int, Any]]:
    values = {"name": "s", "paths": [str(file)], "license": "MIT", **changes}
    config = SourceConfig.model_validate(values)
    return [row for part in list_slices(config, 1) for row in read_raw_rows(part, config)]


def csv_text(delimiter: str, table: list[list[str]]) -> str:
    quoted = (
        delimiter.join(f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in row) for row in table
    )
    return "\r\n".join(quoted) + "\r\n"


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", "，"])
@pytest.mark.parametrize("named", [False, True])
def test_every_delimiter_of_csv_gives_the_same_rows(
    tmp_path: Path, delimiter: str, named: bool
) -> None:
    file = tmp_path / "x.csv"
    file.write_text(csv_text(delimiter, [HEADER, *ROWS]), "utf-8", newline="")
    got = rows(file, **({"delimiter": delimiter} if named else {}))
    assert got == [(n, dict(zip(HEADER, r, strict=True))) for n, r in enumerate(ROWS, start=1)]


def test_a_comma_is_the_delimiter_unless_another_fits_better(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("id,text\n1,a;b\n2,c;d\n", "utf-8")
    assert [row for _, row in rows(file)] == [
        {"id": "1", "text": "a;b"},
        {"id": "2", "text": "c;d"},
    ]
    file.write_text("text\nplain; text\nmore; text\n", "utf-8")
    assert [row for _, row in rows(file)] == [{"text": "plain; text"}, {"text": "more; text"}]
    file.write_text("id;text\n1;Druck 3,5\n2;Druck 4,5\n", "utf-8")
    assert [row for _, row in rows(file)] == [
        {"id": "1", "text": "Druck 3,5"},
        {"id": "2", "text": "Druck 4,5"},
    ]


def test_the_line_that_names_excels_delimiter_is_obeyed(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("sep=|\r\na|text\r\n1|x, y\r\n", "utf-8", newline="")
    assert rows(tmp_path / "x.csv") == [(1, {"a": "1", "text": "x, y"})]


@pytest.mark.parametrize("delimiter", ["ab", "", '"', "\n"])
def test_a_delimiter_is_one_character(tmp_path: Path, delimiter: str) -> None:
    with pytest.raises(ValueError, match="delimiter"):
        rows(tmp_path / "x.csv", delimiter=delimiter)


def test_empty_rows_and_empty_headers_of_a_table(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text(",,\ntext,,\none,,\n,,\ntwo,note,\nthree,,,,\nfour,,,x\n", "utf-8")
    assert rows(file) == [
        (1, {"text": "one"}),
        (3, {"text": "two", "column 2": "note"}),
        (4, {"text": "three"}),
        (5, BrokenRow("has 4 cells, the header 3")),
    ]


def test_a_column_named_twice_is_an_error_that_names_the_columns(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,text,text\n1,2,3\n", "utf-8")
    with pytest.raises(BrokenFile, match=r"twice \(columns 2 and 3\)"):
        rows(tmp_path / "x.csv")


@pytest.mark.parametrize(
    "text",
    [
        '[{"text": "a,]", "n": [1, 2,],}, {"text": "b, }"},\n]',
        '\ufeff[{"text": "a,]", "n": [1, 2]}, {"text": "b, }"}],',
        '{"text": "a,]", "n": [1, 2,]},\n{"text": "b, }"},\n',
    ],
)
def test_json_may_have_trailing_commas(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text, "utf-8")
    expected = [(1, {"text": "a,]", "n": [1, 2]}), (2, {"text": "b, }"})]
    assert rows(tmp_path / "x.json") == expected


def test_a_spreadsheet_gives_the_texts_that_excel_shows(tmp_path: Path) -> None:
    table: list[list[Cell]] = [
        ["id", "text", None, "when", "flag", "value"],
        [1.0, "发烧", None, date(45413), True, 37.5],
        ["007", "two\nlines", "note", date(45413.4375), False, 0.1 + 0.2],
        [None, None],
        [12345678901234.0, "x & y", None, None, None, 1e-07],
    ]
    file = write_xlsx(tmp_path / "x.xlsx", {"Data": table, "Empty": []})
    first = {"id": "1", "text": "发烧", "when": "2024-05-01", "flag": "TRUE", "value": "37.5"}
    second = {
        "id": "007",
        "text": "two\nlines",
        "column 3": "note",
        "when": "2024-05-01 10:30:00",
        "flag": "FALSE",
        "value": "0.3",
    }
    last = {"id": "12345678901234", "text": "x & y", "when": "", "flag": "", "value": "1e-07"}
    assert rows(file) == [(1, first), (2, second), (4, last)]


def test_all_cells_of_a_merged_range_have_its_value(tmp_path: Path) -> None:
    table = [["question", "answer"], ["q", "a1"], [None, "a2"]]
    file = write_xlsx(tmp_path / "x.xlsx", {"S": table}, merged="A2:A3")
    assert rows(file) == [
        (1, {"question": "q", "answer": "a1"}),
        (2, {"question": "q", "answer": "a2"}),
    ]


def test_errors_and_formulas_without_a_value_are_malformed_rows(tmp_path: Path) -> None:
    table = [
        ["a", "text"],
        ["1", "<f>A2+1</f><v></v>"],
        ["2", "<f>A2+1</f><v>3</v>"],
        ["3", "<ERROR>"],
        ["4", "good"],
    ]
    file = write_xlsx(tmp_path / "x.xlsx", {"S": table})
    problem = "is an error, or a formula without a stored value"
    assert rows(file) == [
        (1, BrokenRow(f"cell B2 {problem}")),
        (2, {"a": "2", "text": "3"}),
        (3, BrokenRow(f"cell B4 {problem}")),
        (4, {"a": "4", "text": "good"}),
    ]


def test_a_sheet_is_chosen_by_name_if_several_have_cells(tmp_path: Path) -> None:
    tables = {"Empty": [], "One": [["text"], ["1"]], "Two": [["text"], ["2"]]}
    file = write_xlsx(tmp_path / "x.xlsx", tables, hidden=["Two"])
    with pytest.raises(
        ConfigError, match=r"2 sheets have cells: 'One', 'Two' \(hidden\); set sheet"
    ):
        rows(file)
    assert rows(file, sheet="Two") == [(1, {"text": "2"})]
    with pytest.raises(ConfigError, match="there is no sheet 'Three', only 'One'"):
        rows(file, sheet="Three")
    assert rows(write_xlsx(tmp_path / "y.xlsx", {"Empty": []})) == []


def test_a_damaged_or_protected_spreadsheet_is_one_sentence(tmp_path: Path) -> None:
    file = write_xlsx(tmp_path / "x.xlsx", {"S": [["text"], ["1"]]})
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ConfigError, match=r"x\.xlsx: not a readable spreadsheet"):
        rows(file)
    file.write_bytes(b"\xd0\xcf\x11\xe0" + bytes(600) + "EncryptedPackage".encode("utf-16-le"))
    with pytest.raises(ConfigError, match="password-protected"):
        rows(file)


def test_a_csv_in_utf16_as_excel_writes_unicode_text(tmp_path: Path) -> None:
    text = "question\tanswer\r\n发烧\tdrink\r\n"
    (tmp_path / "x.tsv").write_bytes(text.encode("utf-16"))
    assert rows(tmp_path / "x.tsv") == [(1, {"question": "发烧", "answer": "drink"})]
    (tmp_path / "y.jsonl").write_bytes((json.dumps({"text": "x"}) + "\n").encode("utf-16-le"))
    assert rows(tmp_path / "y.jsonl") == [(1, {"text": "x"})]

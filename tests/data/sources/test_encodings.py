"""The encodings of files: right or refused, never silently wrong."""

import itertools
import json
from pathlib import Path

import pytest

from medgpt.config.base import ConfigError
from medgpt.config.data import SourceConfig
from medgpt.data.sources.encodings import UncertainEncoding, decide_encoding
from medgpt.data.sources.file_slices import list_slices
from medgpt.data.sources.readers import read_slice
from medgpt.data.sources.records import Document, Record, Reject
from tests.data.sources.languages import ENCODINGS, TEXTS

AUTOMATIC = ("utf-8", "utf-8-sig", "utf-16", "gbk", "gb18030", "big5", "big5hkscs", "cp1252")
CASES = [(language, encoding) for language, names in ENCODINGS.items() for encoding in names]


def source(file: Path, **changes: object) -> SourceConfig:
    values = {"name": "s", "paths": [str(file)], "license": "MIT", **changes}
    return SourceConfig.model_validate(values)


def read(file: Path, **changes: object) -> list[Record | Reject]:
    config = source(file, **changes)
    return [item for part in list_slices(config, 1) for item in read_slice(part, config)]


def texts(items: list[Record | Reject]) -> list[str]:
    return [item.text for item in items if isinstance(item, Document)]


def reasons(items: list[Record | Reject]) -> list[tuple[int, str]]:
    return [(item.row, item.reason) for item in items if isinstance(item, Reject)]


def json_lines(rows: tuple[str, ...], encoding: str) -> bytes:
    lines = (json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows)
    return "".join(lines).encode(encoding, "ignore")


@pytest.mark.parametrize(("language", "encoding"), CASES)
def test_no_file_is_silently_read_in_a_wrong_encoding(language: str, encoding: str) -> None:
    samples = [*([text] for text in TEXTS[language]), list(TEXTS[language])]
    for rows in samples:
        data = ("\n".join(rows) + "\n").encode(encoding, "ignore")
        right = data.decode(encoding)
        try:
            read_as = data.decode(decide_encoding([data]))
        except UncertainEncoding:
            read_as = None
        assert (read_as is None) <= (encoding not in ("utf-8", "gbk", "big5"))
        if read_as is not None:
            assert read_as.removeprefix("\ufeff") == right.removeprefix("\ufeff")


@pytest.mark.parametrize(
    ("language", "encoding"), [case for case in CASES if case[1].startswith(AUTOMATIC)]
)
@pytest.mark.parametrize("layout", ["x.jsonl", "x.csv", "x.txt", "x.json"])
def test_the_encodings_of_our_users_are_recognized(
    tmp_path: Path, language: str, encoding: str, layout: str
) -> None:
    rows = [row.encode(encoding, "ignore").decode(encoding) for row in TEXTS[language]] * 3
    content = {
        "x.jsonl": "\r\n".join(json.dumps({"text": r}, ensure_ascii=False) for r in rows),
        "x.csv": "text\n" + "".join('"' + row.replace('"', '""') + '"\n' for row in rows),
        "x.txt": "\n".join(rows),
        "x.json": json.dumps([{"text": row} for row in rows], ensure_ascii=False, indent=1),
    }
    (tmp_path / layout).write_bytes(content[layout].encode(encoding, "ignore"))
    items = read(tmp_path / layout, lines=True)
    expected = rows if not encoding.startswith("utf-8-sig") else [r.strip("\ufeff") for r in rows]
    assert [t.strip() for t in texts(items)] == [row.strip("\ufeff ") for row in expected]


def test_big5_rows_are_not_read_as_gb18030(tmp_path: Path) -> None:
    rows = tuple(
        f"若您是過敏體質或孕婦,第{n}種疫苗請先告知醫護人員,再決定是否注射。" for n in range(60)
    )
    (tmp_path / "x.jsonl").write_bytes(json_lines(rows, "big5"))
    assert texts(read(tmp_path / "x.jsonl")) == list(rows)


@pytest.mark.parametrize(
    ("text", "encoding", "candidate"),
    [
        (TEXTS["Japanese"][0], "cp932", "cp932"),
        (TEXTS["Korean"][0], "cp949", "cp949"),
        (TEXTS["Russian"][0], "cp1251", "cp1251"),
        (TEXTS["Czech"][0], "cp1250", "cp1250"),
        (TEXTS["English, curly"][2], "mac_roman", "mac_roman"),
        (TEXTS["Japanese"][0], "iso2022_jp", "iso2022_jp"),
    ],
)
def test_a_refusal_names_file_byte_candidates_and_key(
    tmp_path: Path, text: str, encoding: str, candidate: str
) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "' + text.encode(encoding) + b'"}\n')
    with pytest.raises(ConfigError, match=r"encoding='auto'.*set encoding") as error:
        list_slices(source(tmp_path / "x.jsonl"), 1)
    for part in (str(tmp_path / "x.jsonl"), candidate):
        assert part in str(error.value)
    assert text[:3] not in str(error.value)
    if encoding != "iso2022_jp":
        assert texts(read(tmp_path / "x.jsonl", encoding=encoding)) == [text]


@pytest.mark.parametrize(
    ("actual", "named", "language"),
    [
        ("gbk", "utf-8", "Simplified Chinese"),
        ("utf-8", "gb18030", "Simplified Chinese"),
        ("utf-8", "latin-1", "French"),
        ("utf-8", "ascii", "French"),
        ("big5", "gbk", "Traditional Chinese"),
        ("gbk", "big5", "Simplified Chinese"),
        ("gbk", "cp1252", "Simplified Chinese"),
        ("gbk", "utf-16", "Simplified Chinese"),
        ("utf-16", "utf-8", "Simplified Chinese"),
        ("cp1252", "utf-8", "English, curly"),
    ],
)
def test_a_wrong_named_encoding_is_an_error_before_anything_is_read(
    tmp_path: Path, actual: str, named: str, language: str
) -> None:
    file = tmp_path / "x.txt"
    file.write_bytes("\n".join(TEXTS[language]).encode(actual, "ignore"))
    with pytest.raises(ConfigError, match=r"x\.txt: .*(byte)"):
        list_slices(source(file, encoding=named), 1)


@pytest.mark.parametrize(
    ("most", "language", "odd", "odd_language"),
    [
        ("utf-8", "Simplified Chinese", "gbk", "Simplified Chinese"),
        ("utf-8", "English, curly", "cp1252", "French"),
        ("gbk", "Simplified Chinese", "utf-8", "Simplified Chinese"),
        ("gbk", "Simplified Chinese", "big5", "Traditional Chinese"),
        ("gbk", "Simplified Chinese", "cp1252", "French"),
        ("big5", "Traditional Chinese", "gbk", "Simplified Chinese"),
        ("big5", "Traditional Chinese", "utf-8", "Traditional Chinese"),
        ("cp1252", "English, curly", "gbk", "Simplified Chinese"),
        ("cp1252", "French", "utf-8", "French"),
        ("cp1252", "French", "big5", "Traditional Chinese"),
    ],
)
@pytest.mark.parametrize("array", [False, True])
def test_a_row_in_another_encoding_is_set_aside(
    tmp_path: Path, most: str, language: str, odd: str, odd_language: str, array: bool
) -> None:
    rows = [row.encode(most, "ignore").decode(most) for row in TEXTS[language]] * 4
    foreign = TEXTS[odd_language][0]
    lines = [json.dumps({"text": r}, ensure_ascii=False).encode(most) for r in rows]
    lines.insert(7, json.dumps({"text": foreign}, ensure_ascii=False).encode(odd))
    file = tmp_path / ("x.json" if array else "x.jsonl")
    file.write_bytes(b"[" + b",\n".join(lines) + b"]" if array else b"\n".join(lines))
    items = read(file)
    assert texts(items) == rows
    [(row, reason)] = reasons(items)
    assert row == 8
    assert "encoding" in reason


def test_a_big_file_is_judged_beyond_its_plain_beginning(tmp_path: Path) -> None:
    plain = b'{"text": "' + b"a" * 90 + b'"}\n'
    for encoding, language in (("big5", "Traditional Chinese"), ("cp1252", "French")):
        rows = TEXTS[language]
        file = tmp_path / f"{encoding}.jsonl"
        file.write_bytes(plain * 30_000 + json_lines(rows, encoding) * 20)
        slices = list_slices(source(file), 1)
        assert len(slices) > 1
        assert len({part.encoding for part in slices}) == 1
        assert texts(read(file))[30_000:] == [*rows] * 20


def test_slices_cut_multibyte_text_at_line_ends(tmp_path: Path) -> None:
    rows = tuple(itertools.islice(itertools.cycle(TEXTS["Traditional Chinese"]), 20_000))
    for encoding in ("big5", "gb18030", "utf-16-le"):
        (tmp_path / "x.jsonl").write_bytes(json_lines(rows, encoding))
        assert texts(read(tmp_path / "x.jsonl")) == list(rows)


def test_a_long_line_may_have_a_broken_byte_in_a_named_encoding(tmp_path: Path) -> None:
    row = "高血压患者应低盐饮食。".encode("gbk") * 3000
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "' + row + b'\xff"}\n')
    for encoding in ("auto", "gb18030"):
        [(number, reason)] = reasons(read(tmp_path / "x.jsonl", encoding=encoding))
        assert (number, reason.split(" at ")[0]) == (1, "broken encoding")


def test_a_spreadsheet_or_archive_named_csv_is_refused_as_such(tmp_path: Path) -> None:
    for start, what in ((b"PK\x03\x04", "Excel or zip"), (b"\xd0\xcf\x11\xe0", "Office")):
        (tmp_path / "x.csv").write_bytes(start + bytes(200))
        with pytest.raises(ConfigError, match=what):
            list_slices(source(tmp_path / "x.csv"), 1)

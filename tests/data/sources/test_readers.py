import bz2
import csv
import gzip
import io
import json
import lzma
import tempfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from medgpt.config.base import ConfigError
from medgpt.config.data import SourceConfig
from medgpt.data.sources import readers
from medgpt.data.sources.file_slices import FileSlice, line_slice_starts, list_slices
from medgpt.data.sources.files import read_chunks
from medgpt.data.sources.readers import read_slice
from medgpt.data.sources.records import Conversation, Document, Record, Reject

TEXTS = ["高血压患者应低盐饮食。", "“引号”和，逗号", "plain English", "第四行：复诊"]
COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def source(*paths: object, **changes: object) -> SourceConfig:
    values = {"name": "s", "paths": [str(p) for p in paths], "license": "MIT", **changes}
    return SourceConfig.model_validate(values)


def read(path: object, **changes: object) -> list[Record | Reject]:
    config = source(path, **changes)
    return [
        item for file_slice in list_slices(config, 1) for item in read_slice(file_slice, config)
    ]


def texts(items: list[Record | Reject]) -> list[str]:
    return [item.text for item in items if isinstance(item, Document)]


def rejects(items: list[Record | Reject]) -> list[tuple[int, str]]:
    return [(item.row, item.reason) for item in items if isinstance(item, Reject)]


def json_lines(values: list[str]) -> str:
    return "".join(json.dumps({"text": v}, ensure_ascii=False) + "\n" for v in values)


def table(values: list[str], delimiter: str) -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([["id", "text"], *enumerate(values)])
    return out.getvalue()


CONTENT = {
    "jsonl": json_lines(TEXTS),
    "ndjson": json_lines(TEXTS),
    "json": json.dumps([{"text": t} for t in TEXTS], ensure_ascii=False, indent=1),
    "csv": table(TEXTS, ","),
    "tsv": table(TEXTS, "\t"),
}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gbk", "gb18030"])
@pytest.mark.parametrize("name", CONTENT)
def test_every_text_format_compression_and_encoding_gives_the_same_records(
    tmp_path: Path, name: str, encoding: str, suffix: str
) -> None:
    file = tmp_path / f"x.{name}{suffix}"
    file.write_bytes(COMPRESS[suffix](CONTENT[name].encode(encoding)))
    items = read(file)
    assert texts(items) == TEXTS
    assert [(i.source, i.file, i.row) for i in items] == [
        ("s", str(file), row) for row in (1, 2, 3, 4)
    ]


def test_json_lines_under_the_name_json_are_lines(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('\ufeff{"text": "一"}\n\n{broken\n{"text": "二"}\n', "utf-8")
    items = read(file)
    assert texts(items) == ["一", "二"]
    assert rejects(items) == [(3, "is not JSON from character 2 on")]


def test_one_object_over_several_lines_is_one_row(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('{\n  "text": "一"\n}\n', "utf-8")
    assert texts(read(file)) == ["一"]


def test_a_json_array_keeps_its_good_rows_beside_broken_bytes(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    rows = ",".join('{"text": "好的，谢谢"}' for _ in range(3)).encode()
    file.write_bytes(b'[{"text": "\xff\xfe"},' + rows + b", 5]")
    items = read(file)
    assert texts(items) == ["好的，谢谢"] * 3
    assert rejects(items) == [
        (1, "broken encoding (read as utf-8)"),
        (5, "row is a number, must be an object"),
    ]


@pytest.mark.parametrize("text", ['[{"text": "一"}, {"te', "", "{", "[" * 100_000])
def test_a_json_file_that_does_not_parse_is_one_reject(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(text, "utf-8")
    [(row, reason)] = rejects(read(file))
    assert row == 0
    assert reason.startswith("the file cannot be read further: is")


def test_txt_is_one_document_or_one_per_line(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_bytes("第一段\r\n\r\n  \n第二段\r\n".encode())
    assert texts(read(file)) == ["第一段\r\n\r\n  \n第二段".replace("\r", "")]
    items = read(file, lines=True)
    assert [(i.row, i.text) for i in items if isinstance(i, Document)] == [
        (1, "第一段"),
        (4, "第二段"),
    ]
    assert len(items) == 2


def test_a_txt_file_that_is_too_long_for_a_document_is_cut_at_line_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "DOCUMENT_BYTES", 1 << 20)
    lines = [f"{n} 高血压患者应低盐饮食。" for n in range(90_000)]
    (tmp_path / "x.txt").write_text("\n".join(lines), "utf-8")
    items = read(tmp_path / "x.txt")
    assert [i.row for i in items] == [1, 2, 3]
    assert "\n".join(texts(items)) == "\n".join(lines)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_txt_is_read_in_chinese_encodings(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"x.txt{suffix}"
    file.write_bytes(COMPRESS[suffix]("中医药大学\n第二行".encode("gbk")))
    assert texts(read(file)) == ["中医药大学\n第二行"]
    assert texts(read(file, lines=True)) == ["中医药大学", "第二行"]


def test_broken_bytes_reject_their_line_only(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    valid = '{"text": "血压"}\n'.encode()
    file.write_bytes(valid + b'{"text": "\xff\xff"}\n' + valid)
    items = read(file)
    assert texts(items) == ["血压", "血压"]
    assert rejects(items) == [(2, "broken encoding at byte 11 (read as utf-8)")]


def test_broken_bytes_in_gbk_reject_their_line_only(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    rows = "id,text\n1,血压\n2,心率\n".encode("gbk")
    file.write_bytes(rows + b"3,\xff\xff\n" + "4,体温\n".encode("gbk"))
    items = read(file)
    assert texts(items) == ["血压", "心率", "体温"]
    assert rejects(items) == [(3, "broken encoding at byte 3 (read as gb18030)")]


def test_a_file_that_fits_no_encoding_is_refused_unless_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_bytes(b"ascii\n\xff\xff\n\xff\xfe\xff\nmore\n")
    with pytest.raises(ConfigError, match=r"not certain \(first byte that is not ASCII: 6\)"):
        read(file)
    items = read(file, lines=True, encoding="utf-8")
    assert texts(items) == ["ascii", "more"]
    assert [row for row, _ in rejects(items)] == [2, 3]
    assert [row for row, _ in rejects(read(file, encoding="utf-8"))] == [1]


def test_a_few_broken_lines_do_not_turn_utf8_into_gb18030(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_bytes("正常的一行\n".encode() * 4 + "高血压\n".encode("gbk") * 6)
    items = read(file, lines=True)
    assert texts(items) == ["正常的一行"] * 4
    assert len(rejects(items)) == 6


def test_the_configured_encoding_is_used(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_bytes("naïve café".encode("latin-1"))
    assert texts(read(file, encoding="latin-1")) == ["naïve café"]


def test_csv_cells_may_hold_line_breaks_and_only_bad_rows_are_rejected(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text('id,text\n1,"两\n行"\n\n2,a,b\n3\n4,"x"y\n5,最后\n', "utf-8")
    items = read(file)
    assert texts(items) == ["两\n行", "最后"]
    assert [i.row for i in items] == [1, 2, 3, 4, 5]
    reasons = dict(rejects(items))
    assert reasons[2] == "has 3 cells, the header 2"
    assert reasons[3] == "has 1 cells, the header 2"
    assert reasons[4].startswith("is not CSV: ")


def test_an_unclosed_quote_is_a_reject(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text('id,text\n1,一\n2,"二\n3,三\n', "utf-8")
    assert rejects(read(file)) == [(2, "is not CSV: unexpected end of data")]


def test_a_table_whose_header_is_wrong_is_one_reject(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("text,text\n1,2\n", "utf-8")
    assert rejects(read(file)) == [
        (0, "the file cannot be read further: the header names a column twice (columns 1 and 2)")
    ]


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    for name in ("x.jsonl", "x.csv"):
        (tmp_path / name).write_text("", "utf-8")
        assert read(tmp_path / name) == []


@given(
    st.lists(st.sampled_from(["一", "two words", "", " ", "高血压" * 9]), min_size=1, max_size=30),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.integers(1, 120),
    st.integers(1, 64),
)
@settings(max_examples=60, deadline=None)
def test_byte_ranges_together_give_the_rows_of_the_file(
    values: list[str], end: str, closed: bool, step: int, chunk: int
) -> None:
    data = (end.join(values) + (end if closed else "")).encode()
    with tempfile.NamedTemporaryFile(suffix=".txt") as file:
        file.write(data)
        file.flush()
        config = source(file.name, lines=True)
        cuts = line_slice_starts([data[i : i + chunk] for i in range(0, len(data), chunk)], step)
        stops = [cut.start for cut in cuts[1:]] + [None]
        slices = [
            FileSlice("s", file.name, "txt", "utf-8", cut.start, stop, 0, cut.first_row)
            for cut, stop in zip(cuts, stops, strict=True)
        ]
        items = [item for file_slice in slices for item in read_slice(file_slice, config)]
    numbered_texts = [(i.row, i.text) for i in items if isinstance(i, Document)]
    assert numbered_texts == [(n, v) for n, v in enumerate(values, start=1) if v.strip()]
    assert len(numbered_texts) == len(items)


def test_slices_of_a_file_keep_its_line_numbers(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": f"{i} " + "x" * 200}) for i in range(12_000)]
    file.write_text("\n".join(lines), "utf-8")
    config = source(file)
    slices = list_slices(config, 1)
    assert len(slices) == 3
    items = [item for file_slice in slices for item in read_slice(file_slice, config)]
    assert [i.row for i in items] == list(range(1, 12_001))
    assert [t.split()[0] for t in texts(items)] == [str(i) for i in range(12_000)]


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_several_compressed_members_are_all_read(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"x.jsonl{suffix}"
    file.write_bytes(b"".join(COMPRESS[suffix](json_lines([t]).encode()) for t in TEXTS))
    assert texts(read(file)) == TEXTS


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_compressed_data_gives_its_rows_and_then_a_reject(
    tmp_path: Path, suffix: str
) -> None:
    file = tmp_path / f"x.jsonl{suffix}"
    # several members, so that the first rows are complete with any block size of the codec
    members = [COMPRESS[suffix](json_lines([t]).encode()) for t in TEXTS]
    file.write_bytes(b"".join(members)[: -len(members[-1]) // 2])
    items = read(file)
    assert texts(items) == TEXTS[:3]
    assert rejects(items) == [
        (4, "the file cannot be read further: compressed data ends too early")
    ]


def test_damaged_compressed_data_is_a_reject(tmp_path: Path) -> None:
    for suffix in (".gz", ".zst", ".bz2", ".xz"):
        file = tmp_path / f"x.jsonl{suffix}"
        file.write_bytes(b"this is not compressed at all")
        assert rejects(read(file)) == [
            (0, "the file cannot be read further: compressed data is damaged")
        ]


def test_a_broken_parquet_shard_among_good_ones_is_one_reject(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        pq.write_table(pa.table({"text": TEXTS}), tmp_path / f"{name}.parquet")
    content = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(content[: len(content) // 2])
    items = read(tmp_path)
    assert texts(items) == TEXTS * 2
    [reject] = [i for i in items if isinstance(i, Reject)]
    assert (Path(reject.file).name, reject.row) == ("b.parquet", 0)
    assert reject.reason == "the file cannot be read further: damaged Parquet data"


def test_damage_inside_parquet_loses_the_rows_after_it(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    values = [f"{i:05d}" * 300 for i in range(40)]
    pq.write_table(pa.table({"text": values}), file, row_group_size=10, write_page_checksum=True)
    data = bytearray(file.read_bytes())
    position = data.find(b"00030" * 3)
    assert position > 0
    data[position - 60 : position + 40] = b"\x00" * 100
    file.write_bytes(bytes(data))
    items = read(file)
    assert texts(items) == values[:30]
    assert [row for row, _ in rejects(items)] == [31]


def test_parquet_row_groups_keep_row_numbers_and_nested_rows(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    pq.write_table(pa.table({"messages": [turns] * 6}), file, row_group_size=2)
    config = source(file)
    file_slice = FileSlice("s", str(file), "parquet", "auto", 1, 2, 0, 3)
    items = list(read_slice(file_slice, config))
    assert [i.row for i in items] == [3, 4]
    assert all(isinstance(i, Conversation) for i in items)
    assert len(read(file)) == 6


def test_parquet_text_that_is_not_utf8_rejects_its_row(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    good = "好".encode()
    broken = pa.array([good, b"\xff\xff", good], pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": broken}), file)
    items = read(file)
    assert texts(items) == ["好", "好"]
    assert [row for row, _ in rejects(items)] == [2]


YEAR_10000 = pa.array([None, 253_402_300_800_000_000], pa.timestamp("us"))
UNHELD = {
    "year 10000": YEAR_10000,
    "large date": pa.array([0, 2**31 - 1], pa.date32()),
    "unknown time zone": YEAR_10000.cast(pa.timestamp("us", "Mars/Olympus_Mons")),
    "long duration": pa.array([0, 2**62], pa.duration("s")),
}


@pytest.mark.parametrize("name", UNHELD)
def test_dates_that_python_cannot_hold_do_no_harm_where_nobody_uses_them(
    tmp_path: Path, name: str
) -> None:
    file = tmp_path / "x.parquet"
    nested = pa.StructArray.from_arrays([UNHELD[name]], ["time"])
    pq.write_table(pa.table({"text": ["一", "二"], "time": UNHELD[name]}), file)
    assert texts(read(file)) == ["一", "二"]
    assert texts(read(file, mapping={"text": "{{ text }}"})) == ["一", "二"]
    held = [] if name == "unknown time zone" else ["一"]
    problem = "has a date or time that Python cannot hold"
    for changes in ({"mapping": {"text": "{{ text if time or 1 }}"}}, {}):
        if not changes:
            pq.write_table(pa.table({"text": ["一", "二"], "nested": nested}), file)
        items = read(file, **changes)
        assert texts(items) in (held, ["一"])
        assert (2, problem) in rejects(items)


def test_files_of_any_filesystem_are_read() -> None:
    data = gzip.compress(CONTENT["jsonl"].encode())
    fsspec.filesystem("memory").pipe("/readers/x.jsonl.gz", data)
    assert texts(read("memory://readers")) == TEXTS


def test_chunks_respect_the_range(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(bytes(range(256)))
    assert b"".join(read_chunks(str(file), 10, 20)) == bytes(range(10, 20))
    assert b"".join(read_chunks(str(file), 250)) == bytes(range(250, 256))
    assert b"".join(read_chunks(str(file), 5, 5)) == b""


def test_no_reason_quotes_the_row(tmp_path: Path) -> None:
    secret = "患者张三"
    lines = [
        f'{{"text": "{secret}',
        f'["{secret}"]',
        f'"{secret}"',
        f'{{"messages": "{secret}"}}',
        f'{{"messages": [{{"role": "{secret}", "content": "{secret}"}}]}}',
        f'{{"question": {{"{secret}": 1}}, "answer": "{secret}"}}',
        f'{{"instruction": "{secret}", "output": ["{secret}"]}}',
        f'{{"instruction": "{secret}", "output": "x", "history": [["{secret}"]]}}',
        f'{{"{secret * 9}": 1}}',
        f'{{"conversations": [{{"from": "human", "value": "{secret}"}}]}}',
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines), "utf-8")
    (tmp_path / "y.csv").write_text(f'text\n"{secret}"x\n{secret},{secret}\n', "utf-8")
    items = read(tmp_path)
    assert len(items) == 12
    for row, reason in rejects(items):
        assert secret not in reason, row
    assert len(rejects(items)) == 12

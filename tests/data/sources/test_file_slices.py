from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medgpt.config.base import ConfigError
from medgpt.config.data import SourceConfig
from medgpt.data.sources.file_slices import SliceStart, line_slice_starts, list_slices


def source(*paths: object, **changes: object) -> SourceConfig:
    values = {"name": "s", "paths": [str(p) for p in paths], "license": "MIT", **changes}
    return SourceConfig.model_validate(values)


def write(path: Path, text: str = "{}\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def test_a_directory_lists_known_formats_sorted_without_hidden_files(tmp_path: Path) -> None:
    names = ["b.jsonl", "a.csv.gz", "sub/c.parquet", "sub/d.JSON", "e.txt.zst", "f.ndjson"]
    skipped = ["README.md", ".g.jsonl", ".hidden/h.jsonl", "_SUCCESS", "i.gz"]
    for name in (*names, *skipped):
        write(tmp_path / name)
    slices = list_slices(source(tmp_path), 1)
    assert [u.file for u in slices] == sorted(str(tmp_path / name) for name in names)
    assert [u.index for u in slices] == list(range(len(names)))
    formats = {Path(u.file).name: u.format for u in slices}
    assert formats["a.csv.gz"] == "csv"
    assert formats["d.JSON"] == "json"
    assert formats["f.ndjson"] == "jsonl"


def test_the_order_of_paths_does_not_change_the_listing(tmp_path: Path) -> None:
    for name in ("x.jsonl", "y.jsonl"):
        write(tmp_path / name)
    listed = list_slices(source(tmp_path / "y.jsonl", tmp_path), 1)
    listed_again = list_slices(source(tmp_path / "*.jsonl", tmp_path / "x.jsonl"), 1)
    assert listed == listed_again
    assert len(listed) == 2


def test_a_recursive_glob_and_a_name_with_brackets_are_found(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "c.jsonl")
    write(tmp_path / "[1].jsonl")
    assert len(list_slices(source(tmp_path / "**" / "*.jsonl"), 1)) == 2
    assert len(list_slices(source(tmp_path / "[1].jsonl"), 1)) == 1


def test_uris_of_any_filesystem_are_listed() -> None:
    fsspec.filesystem("memory").pipe("/slices/a/b.jsonl", b"{}\n")
    assert [u.file for u in list_slices(source("memory://slices"), 1)] == [
        "memory:///slices/a/b.jsonl"
    ]
    assert len(list_slices(source("memory://slices/*/*.jsonl"), 1)) == 1


@pytest.mark.parametrize("path", ["missing.jsonl", "*.jsonl", "empty", "nosuch://x/y.jsonl"])
def test_a_path_without_files_is_an_error_that_names_it(tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    full = path if "://" in path else str(tmp_path / path)
    with pytest.raises(ConfigError, match=r"data\.sources s paths") as error:
        list_slices(source(full), 1)
    assert full in str(error.value)


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("oss", "ossfs")])
def test_the_error_of_a_missing_filesystem_package_names_the_package(
    scheme: str, package: str
) -> None:
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(ConfigError, match=f"nstall {package}"):
        list_slices(source(f"{scheme}://bucket/x.jsonl"), 1)


@pytest.mark.parametrize("encoding", ["cp037", "no-such-codec"])
def test_an_encoding_that_is_unknown_or_has_no_common_line_end_is_an_error(encoding: str) -> None:
    with pytest.raises(ConfigError, match="encoding='"):
        list_slices(source("x.jsonl", encoding=encoding), 1)


def test_an_unknown_extension_is_an_error_unless_format_is_set(tmp_path: Path) -> None:
    file = write(tmp_path / "x.log")
    with pytest.raises(ConfigError, match=r"unknown extension.*set format"):
        list_slices(source(file), 1)
    assert list_slices(source(file, format="jsonl"), 1)[0].format == "jsonl"


@given(
    st.lists(st.binary(max_size=9).map(lambda b: b.replace(b"\n", b"-")), min_size=1),
    st.integers(1, 40),
    st.integers(1, 40),
)
def test_slices_start_at_line_starts_with_their_line_numbers(
    lines: list[bytes], step: int, chunk: int
) -> None:
    data = b"\n".join(lines)
    cuts = line_slice_starts([data[i : i + chunk] for i in range(0, len(data), chunk)], step)
    assert cuts[0] == SliceStart(0, 1)
    for before, cut in pairwise(cuts):
        assert data[cut.start - 1 : cut.start] == b"\n"
        assert cut.first_row == 1 + data[: cut.start].count(b"\n")
        # no line starts between the target and the slice
        assert b"\n" not in data[before.start + step - 1 : cut.start - 1]
        assert cut.start < len(data)


def test_files_of_lines_are_split_and_all_slices_have_one_encoding(tmp_path: Path) -> None:
    line = '{"text": "' + "a" * 90 + '"}\n'
    text = line * 30_000 + '{"text": "中文"}\n' + line * 10_000
    file = tmp_path / "big.jsonl"
    file.write_bytes(text.encode("gbk"))
    slices = list_slices(source(file), 1)
    assert len(slices) == 4
    assert {u.encoding for u in slices} == {"gb18030"}
    assert [u.stop for u in slices[:-1]] == [u.start for u in slices[1:]]
    assert (slices[0].start, slices[-1].stop) == (0, None)
    starts = [u.start for u in slices]
    assert all(0 <= two - one - (1 << 20) < len(line) for one, two in pairwise(starts))
    assert [u.index for u in slices] == [0, 1, 2, 3]
    compressed = tmp_path / "big.jsonl.gz"
    compressed.write_bytes(file.read_bytes())
    assert len(list_slices(source(compressed), 1)) == 1


def test_txt_is_split_only_if_every_line_is_a_document(tmp_path: Path) -> None:
    file = write(tmp_path / "big.txt", "x" * 99 + "\n")
    file.write_bytes(file.read_bytes() * 30_000)
    assert len(list_slices(source(file), 1)) == 1
    assert len(list_slices(source(file, lines=True), 1)) == 3


def test_parquet_is_split_between_row_groups(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    texts = [f"{i:06d}" * 20_000 for i in range(40)]
    table = pa.table({"text": pa.array(texts)})
    pq.write_table(table, file, row_group_size=5, compression="none", use_dictionary=False)
    slices = list_slices(source(file), 1)
    assert [(u.start, u.stop, u.first_row) for u in slices] == [
        (0, 2, 1),
        (2, 4, 11),
        (4, 6, 21),
        (6, None, 31),
    ]


def test_a_broken_parquet_file_is_one_slice_that_its_reader_reports(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", "PAR1 no")
    slices = list_slices(source(tmp_path), 1)
    assert [(u.start, u.stop) for u in slices] == [(0, None)]

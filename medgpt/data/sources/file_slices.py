"""Lists the files of a source and cuts them into slices, each of which one task reads."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from medgpt.config.base import ConfigError
from medgpt.config.data import SourceConfig
from medgpt.data.sources.encodings import UncertainEncoding, check_encoding, decide_encoding
from medgpt.data.sources.files import (
    BrokenFile,
    compression_suffix,
    is_wide,
    open_file,
    read_chunks,
)
from medgpt.data.sources.spreadsheets import SheetError, open_sheet

FORMATS = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".xlsx": "xlsx",
    ".xlsm": "xlsx",
    ".xls": "xlsx",
    ".ods": "xlsx",
}
BINARY_FORMATS = ("parquet", "xlsx")
ENCODING_THREADS = 16  # files whose beginnings are read at a time
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class FileSlice:
    """A range of bytes or row groups of one file."""

    source: str  # name of the source
    file: str  # path or URI
    format: str  # txt, jsonl, json, csv, tsv, parquet or xlsx (any spreadsheet)
    encoding: str  # a codec; not used by parquet
    start: int  # byte at which a line starts, or number of a row group
    stop: int | None  # exclusive end, in the same unit; None is the end of the file
    index: int  # position among the slices of its source
    first_row: int = 1  # line or row number at `start`


class SliceStart(NamedTuple):
    """Start of a slice."""

    start: int
    first_row: int


def list_slices(source: SourceConfig, shard_mb: int) -> list[FileSlice]:
    """Return all slices of `source`, files in sorted order, the same at every call.

    Raises:
        ConfigError: a path matches nothing, or the format or the encoding of a file is unknown.
    """
    slices: list[FileSlice] = []
    files = list_files(source)
    formats = [_detect_format(file, source) for file in files]
    with ThreadPoolExecutor(ENCODING_THREADS) as threads:  # object stores answer slowly
        encodings = list(threads.map(partial(_file_encoding, source), files, formats))
    for file, file_format, encoding in zip(files, formats, encodings, strict=True):
        starts = _slice_starts(file, file_format, encoding, source, shard_mb * MIB)
        stops = [following.start for following in starts[1:]] + [None]
        for (start, first_row), stop in zip(starts, stops, strict=True):
            index = len(slices)
            slices.append(
                FileSlice(source.name, file, file_format, encoding, start, stop, index, first_row)
            )
    return slices


def list_files(source: SourceConfig) -> list[str]:
    """Return the sorted files of `source`, opening none. Raises ConfigError like `list_slices`."""
    _check_encoding(source)
    files = sorted({file for path in source.paths for file in _expand_path(path, source)})
    for file in files:
        _detect_format(file, source)
    return files


def _check_encoding(source: SourceConfig) -> None:
    """Raise ConfigError unless the encoding exists and files can be split at its line ends."""
    try:
        fits = source.encoding == "auto" or (
            is_wide(source.encoding) or "\n".encode(source.encoding).endswith(b"\n")
        )
    except LookupError:
        fits = False
    if not fits:
        raise ConfigError(
            f"data.sources {source.name} encoding={source.encoding!r}: unknown, or has no common "
            "line end; use auto or a Python codec such as gb18030, or convert to UTF-8"
        )


def _file_encoding(source: SourceConfig, file: str, file_format: str) -> str:
    """Return the encoding of a whole file, before it is cut into slices that might disagree."""
    if file_format == "xlsx":
        _check_sheet(source, file)
    if file_format in BINARY_FORMATS:
        return source.encoding
    try:
        if source.encoding == "auto":
            return decide_encoding(_readable_chunks(file))
        check_encoding(_readable_chunks(file), source.encoding)
        return source.encoding
    except UncertainEncoding as problem:
        remedy = "set encoding to the right Python codec, or convert the file to UTF-8"
        raise ConfigError(
            f"data.sources {source.name} encoding={source.encoding!r}: {file}: {problem}; {remedy}"
        ) from None


def _check_sheet(source: SourceConfig, file: str) -> None:
    """Raise ConfigError unless it is clear which sheet to read."""
    try:
        open_sheet(b"".join(_readable_chunks(file)), source.sheet)
    except SheetError as problem:
        raise ConfigError(
            f"data.sources {source.name} sheet={source.sheet!r}: {file}: {problem}"
        ) from None


def _readable_chunks(file: str) -> Iterator[bytes]:
    """Yield what can be read of a file; its reader reports the damage."""
    with suppress(BrokenFile):
        yield from read_chunks(file)


def _expand_path(path: str, source: SourceConfig) -> list[str]:
    """Return the files of a file name, a directory or a glob."""
    try:
        filesystem, root = fsspec.url_to_fs(path)
        if filesystem.isfile(root):
            files = [root]
        elif filesystem.isdir(root):
            files = [f for f in filesystem.find(root) if _has_wanted_format(f, root, source)]
        else:
            files = [f for f in filesystem.glob(root) if filesystem.isfile(f)]
            files = [f for f in files if not PurePosixPath(f).name.startswith(".")]
    except Exception as error:  # each filesystem raises its own types
        remedy = "check the address and the credentials"
        raise _path_error(source, path, f"cannot be listed ({error})", remedy) from None
    if not files:
        rule = "no file of a known format" if filesystem.isdir(root) else "no such file"
        raise _path_error(source, path, rule, "relative paths start at the current folder")
    return [filesystem.unstrip_protocol(file) if "://" in path else file for file in files]


def _has_wanted_format(file: str, root: str, source: SourceConfig) -> bool:
    """Whether a file of a directory is not hidden and has the configured format, if one is set."""
    detected = FORMATS.get(_extension(file))
    if detected is None or source.format not in ("auto", detected):
        return False
    return not any(part.startswith(".") for part in PurePosixPath(file).relative_to(root).parts)


def _extension(file: str) -> str:
    """Return the extension below the compression suffix: .jsonl for data.jsonl.gz."""
    return PurePosixPath(file.lower().removesuffix(compression_suffix(file) or "")).suffix


def _detect_format(file: str, source: SourceConfig) -> str:
    if source.format != "auto":
        return source.format
    if _extension(file) not in FORMATS:
        rule = f"unknown extension, known: {' '.join(FORMATS)}"
        raise _path_error(source, file, rule, "set format or rename it")
    return FORMATS[_extension(file)]


def _path_error(source: SourceConfig, path: str, rule: str, remedy: str) -> ConfigError:
    return ConfigError(f"data.sources {source.name} paths={path!r}: {rule}; {remedy}")


def _slice_starts(
    file: str, file_format: str, encoding: str, source: SourceConfig, slice_bytes: int
) -> list[SliceStart]:
    """Return the starts of slices of about `slice_bytes` bytes."""
    if source.group_by is not None:
        return [SliceStart(0, 1)]
    if file_format == "parquet":
        return row_group_slice_starts(file, slice_bytes)
    splittable = file_format == "jsonl" or (file_format == "txt" and source.lines)
    if not splittable or compression_suffix(file) or is_wide(encoding):
        return [SliceStart(0, 1)]
    if file_size(file) < 2 * slice_bytes:
        return [SliceStart(0, 1)]
    return line_slice_starts(read_chunks(file), slice_bytes)


def file_size(file: str) -> int:
    """Return the stored size of a file in bytes."""
    filesystem, path = fsspec.url_to_fs(file)
    return int(filesystem.size(path) or 0)


def line_slice_starts(chunks: Iterable[bytes], slice_bytes: int) -> list[SliceStart]:
    """Return the first line start after every `slice_bytes` bytes, with its line number."""
    starts, offset, line = [SliceStart(0, 1)], 0, 1
    for chunk in chunks:
        position = 0
        while True:
            target = starts[-1].start + slice_bytes - offset  # next start, relative to the chunk
            newline = chunk.find(b"\n", max(position, target - 1))
            if newline < 0:
                break
            line += chunk.count(b"\n", position, newline + 1)
            position = newline + 1
            starts.append(SliceStart(offset + position, line))
        line += chunk.count(b"\n", position)
        offset += len(chunk)
    return starts[:1] + [cut for cut in starts[1:] if cut.start < offset]


def row_group_slice_starts(file: str, slice_bytes: int) -> list[SliceStart]:
    """Return the first row group after every `slice_bytes` bytes.

    A broken file is one slice; its reader reports it.
    """
    with open_file(file) as stream:
        try:
            metadata = pq.ParquetFile(stream).metadata
        except pa.ArrowInvalid:
            return [SliceStart(0, 1)]
    starts, size, row = [SliceStart(0, 1)], 0, 1
    for group in range(metadata.num_row_groups):
        if size >= slice_bytes:
            starts.append(SliceStart(group, row))
            size = 0
        size += metadata.row_group(group).total_byte_size
        row += metadata.row_group(group).num_rows
    return starts

"""What there is to read: the files of a source, cut into pieces that one task reads."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from medgpt.config.base import ConfigError
from medgpt.config.data import SourceConfig
from medgpt.data.sources.files import compression, find_encoding, open_file, read_chunks

FORMATS = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of one file."""

    source: str  # name of the source
    file: str  # path or URI
    format: str  # txt, jsonl, json, csv, tsv or parquet
    encoding: str  # a codec, or auto
    start: int  # byte of a line's start, or row group; 0 if the unit is the whole file
    stop: int | None  # the same, excluded; None is the end of the file
    index: int  # position among the units of its source
    first_row: int = 1  # line or row number at start


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a unit begins."""

    start: int
    first_row: int


def list_units(source: SourceConfig, shard_mb: int) -> list[Unit]:
    """All pieces of `source`, files in sorted order, the same at every call.

    Raises:
        ConfigError: a path matches nothing, a file's format or the encoding is unknown.
    """
    units: list[Unit] = []
    for file in list_files(source):
        name = _format(file, source)
        encoding, cuts = _cut(file, name, source, shard_mb * MIB)
        stops = [cut.start for cut in cuts[1:]] + [None]
        for cut, stop in zip(cuts, stops, strict=True):
            units.append(
                Unit(source.name, file, name, encoding, cut.start, stop, len(units), cut.first_row)
            )
    return units


def list_files(source: SourceConfig) -> list[str]:
    """The files of `source`, sorted; none is opened. Raises ConfigError like `list_units`."""
    _check_encoding(source)
    files = sorted({file for path in source.paths for file in _expand(path, source)})
    for file in files:
        _format(file, source)
    return files


def _check_encoding(source: SourceConfig) -> None:
    """Lines are found as bytes, so a line end must be one byte."""
    try:
        fits = source.encoding == "auto" or "\n".encode(source.encoding) == b"\n"
    except LookupError:
        fits = False
    if not fits:
        raise ConfigError(
            f"data.sources {source.name} encoding={source.encoding!r}: no encoding whose line end "
            "is one byte; use auto or a Python codec such as gb18030, or convert to UTF-8"
        )


def _expand(path: str, source: SourceConfig) -> list[str]:
    """Files behind a file name, a directory or a glob."""
    try:
        filesystem, root = fsspec.url_to_fs(path)
        if filesystem.isfile(root):
            found = [root]
        elif filesystem.isdir(root):
            found = [file for file in filesystem.find(root) if _wanted(file, root, source)]
        else:
            found = [file for file in filesystem.glob(root) if filesystem.isfile(file)]
            found = [file for file in found if not _hidden(PurePosixPath(file).name)]
    except Exception as error:  # every kind of store has its own
        remedy = "check the address and the credentials"
        raise _error(source, path, f"cannot be listed ({error})", remedy) from None
    if not found:
        rule = "no file of a known format" if filesystem.isdir(root) else "no such file"
        raise _error(source, path, rule, "relative paths start at the current folder")
    return [filesystem.unstrip_protocol(file) if "://" in path else file for file in found]


def _wanted(file: str, root: str, source: SourceConfig) -> bool:
    """Directories give files of a known format, of the one that is asked for if any."""
    inside = PurePosixPath(file).relative_to(root)
    found = FORMATS.get(_suffix(file))
    asked = found if source.format == "auto" else source.format
    return found is not None and found == asked and not any(map(_hidden, inside.parts))


def _hidden(part: str) -> bool:
    return part.startswith(".")


def _suffix(file: str) -> str:
    """.jsonl of data.jsonl.gz"""
    return PurePosixPath(file.lower().removesuffix(compression(file) or "")).suffix


def _format(file: str, source: SourceConfig) -> str:
    if source.format != "auto":
        return source.format
    if _suffix(file) not in FORMATS:
        known = " ".join(FORMATS)
        raise _error(source, file, f"unknown extension, known: {known}", "set format or rename it")
    return FORMATS[_suffix(file)]


def _error(source: SourceConfig, path: str, rule: str, remedy: str) -> ConfigError:
    return ConfigError(f"data.sources {source.name} paths={path!r}: {rule}; {remedy}")


def _cut(file: str, name: str, source: SourceConfig, step: int) -> tuple[str, list[Cut]]:
    """The encoding and the beginnings of units of about `step` bytes."""
    if source.group_by is not None:
        return source.encoding, [Cut(0, 1)]
    if name == "parquet":
        return source.encoding, cut_row_groups(file, step)
    splits = name == "jsonl" or (name == "txt" and source.lines)
    if not splits or compression(file) or file_size(file) < 2 * step:
        return source.encoding, [Cut(0, 1)]
    # one piece must not decide on its own encoding
    auto = source.encoding == "auto"
    encoding = find_encoding(read_chunks(file)) if auto else source.encoding
    return encoding, cut_lines(read_chunks(file), step)


def file_size(file: str) -> int:
    """Bytes of a file, as it is stored."""
    filesystem, path = fsspec.url_to_fs(file)
    return int(filesystem.size(path) or 0)


def cut_lines(chunks: Iterable[bytes], step: int) -> list[Cut]:
    """The line starts nearest after every `step` bytes, with their line numbers."""
    cuts, offset, line = [Cut(0, 1)], 0, 1
    for chunk in chunks:
        begin = 0
        while True:
            wanted = cuts[-1].start + step - offset  # of the next cut, within the chunk
            newline = chunk.find(b"\n", max(begin, wanted - 1))
            if newline < 0:
                break
            line += chunk.count(b"\n", begin, newline + 1)
            begin = newline + 1
            cuts.append(Cut(offset + begin, line))
        line += chunk.count(b"\n", begin)
        offset += len(chunk)
    return cuts[:1] + [cut for cut in cuts[1:] if cut.start < offset]


def cut_row_groups(file: str, step: int) -> list[Cut]:
    """The first row group after every `step` bytes; a broken file is one unit, its reader tells."""
    with open_file(file) as stream:
        try:
            metadata = pq.ParquetFile(stream).metadata
        except pa.ArrowInvalid:
            return [Cut(0, 1)]
    cuts, size, row = [Cut(0, 1)], 0, 1
    for group in range(metadata.num_row_groups):
        if size >= step:
            cuts.append(Cut(group, row))
            size = 0
        size += metadata.row_group(group).total_byte_size
        row += metadata.row_group(group).num_rows
    return cuts

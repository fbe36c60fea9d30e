"""Input files of a run, and whether they changed since it read them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import fsspec

from medgpt.artifacts import stream_checksum
from medgpt.config.data import DataConfig
from medgpt.data.sources.deny_list import DenyList
from medgpt.data.sources.file_slices import file_size, list_files
from medgpt.data.sources.files import open_file
from medgpt.data.sources.row_formats import RowParser


def check_sources(config: DataConfig) -> None:
    """Raise ConfigError for a missing file, or an invalid template or deny-list. Reads no data."""
    for source in config.sources:
        list_files(source)
        RowParser(source)
        DenyList.load(source.deny)


def input_files(config: DataConfig) -> list[str]:
    """Return data files and deny-lists without duplicates, in the order of the sources."""
    data = [file for source in config.sources for file in list_files(source)]
    deny = [name for source in config.sources for name in source.deny if name != "default"]
    return list(dict.fromkeys(data + deny))


def input_bytes(config: DataConfig) -> int:
    """Return the stored size of all input files in bytes."""
    return sum(map(file_size, input_files(config)))


def file_stamp(file: str) -> str:
    """Return a stamp of size, times and identity that changes when the file may have changed."""
    filesystem, path = fsspec.url_to_fs(file)
    return filesystem.ukey(path)


def file_digest(file: str) -> str:
    """Return the xxHash (XXH3, 128 bits) of the bytes of a file."""
    with open_file(file) as stream:
        return stream_checksum(stream)


def describe_changes(inputs: Sequence[Mapping[str, Any]], config: DataConfig) -> Iterator[str]:
    """Describe each difference between the input files of a manifest and the present ones.

    Reads a file only if its stamp differs.
    """
    known = {entry["file"]: entry for entry in inputs}
    files = input_files(config)
    yield from (f"{file} is gone" for file in known if file not in set(files))
    for file in files:
        if file not in known:
            yield f"{file} is new"
        elif (
            file_stamp(file) != known[file]["stamp"] and file_digest(file) != known[file]["xxh128"]
        ):
            yield f"{file} has other content"

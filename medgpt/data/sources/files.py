"""Reads bytes and text lines of files, local or remote, plain or compressed."""

import bz2
import codecs
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import BinaryIO, Protocol, cast

import fsspec
import zstandard

from medgpt.data.sources.readings import foreign_encoding

READ_BYTES = 1 << 20  # bytes read at a time


class BrokenFile(Exception):
    """The content of a file does not match its format. The message never quotes it."""


@dataclass(frozen=True, slots=True)
class BrokenRow:
    """A row that could not be read."""

    reason: str


class Decompressor(Protocol):
    """Common interface of zlib, bz2, lzma and zstandard."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


DECOMPRESSORS: dict[str, Callable[[], Decompressor]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
}


def compression_suffix(file: str) -> str | None:
    """Return the compression suffix of a file name, or None if it has none."""
    return next((suffix for suffix in DECOMPRESSORS if file.lower().endswith(suffix)), None)


@contextmanager
def open_file(file: str) -> Iterator[BinaryIO]:
    """Open a path or fsspec URI to read its bytes as they are stored."""
    filesystem, path = fsspec.url_to_fs(file)
    with filesystem.open(path, "rb") as stream:
        yield cast(BinaryIO, stream)


def read_chunks(file: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Yield the decompressed content. `start` and `stop` are byte offsets of an uncompressed file.

    Raises:
        BrokenFile: compressed data is damaged or truncated; everything before it was yielded.
    """
    suffix = compression_suffix(file)
    with open_file(file) as stream:
        stream.seek(start)
        if suffix is None:
            remaining = READ_BYTES if stop is None else stop - start
            while remaining and (chunk := stream.read(min(READ_BYTES, remaining))):
                remaining -= len(chunk) if stop is not None else 0
                yield chunk
        else:
            yield from _decompress(stream, DECOMPRESSORS[suffix])


def _decompress(stream: BinaryIO, new_decompressor: Callable[[], Decompressor]) -> Iterator[bytes]:
    """Yield all members or frames.

    The readers of the libraries stop silently after the first member, or where a file was cut off.
    """
    decompressor = new_decompressor()
    while data := stream.read(READ_BYTES):
        while data:
            decompressor = new_decompressor() if decompressor.eof else decompressor
            try:
                chunk = decompressor.decompress(data)
            except (zlib.error, OSError, lzma.LZMAError, zstandard.ZstdError):
                raise BrokenFile("compressed data is damaged") from None
            yield chunk
            data = decompressor.unused_data if decompressor.eof else b""
    if not decompressor.eof:
        raise BrokenFile("compressed data ends too early")


def narrow_chunks(chunks: Iterable[bytes], encoding: str) -> tuple[Iterable[bytes], str]:
    """Return chunks in which a line end is one byte, and their encoding: UTF-16 becomes UTF-8."""
    if not is_wide(encoding):
        return chunks, encoding
    return _as_utf8(chunks, encoding), "utf-8"


def is_wide(encoding: str) -> bool:
    """Whether a line end has several bytes."""
    return codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))


def _as_utf8(chunks: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    decoder, num_read = codecs.getincrementaldecoder(encoding)(), 0
    for chunk in chain(chunks, [b""]):
        try:
            yield decoder.decode(chunk, final=not chunk).encode()
        except UnicodeDecodeError as error:
            raise BrokenFile(f"not {encoding} near byte {num_read + error.start}") from None
        num_read += len(chunk)


def decode(data: bytes, encoding: str) -> str | BrokenRow:
    """Return the text of a row, or why it is broken. A row in another encoding is broken, too."""
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        return BrokenRow(f"broken encoding at byte {error.start + 1} (read as {encoding})")
    foreign = (foreign_encoding(line, encoding) for line in data.split(b"\n"))
    if encoding != "utf-8" and (other := next(filter(None, foreign), None)) is not None:
        return BrokenRow(f"another encoding, perhaps {other} (the file is read as {encoding})")
    return text


def is_valid(data: bytes, encoding: str) -> bool:
    """Whether all bytes decode."""
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def text_lines(chunks: Iterable[bytes], encoding: str) -> Iterator[str | BrokenRow]:
    """Yield lines without line ends."""
    unfinished: list[bytes] = []
    first = True
    for chunk in chunks:
        head, *lines = chunk.split(b"\n")
        unfinished.append(head)
        for following in lines:
            yield _decode_line(b"".join(unfinished), encoding, first)
            unfinished = [following]
            first = False
    if data := b"".join(unfinished):
        yield _decode_line(data, encoding, first)


def _decode_line(data: bytes, encoding: str, first: bool) -> str | BrokenRow:
    text = decode(data, encoding)
    if isinstance(text, str):
        text = text.removesuffix("\r")
        return text.removeprefix("\ufeff") if first else text  # byte order mark
    return text

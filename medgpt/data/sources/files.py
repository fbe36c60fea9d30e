"""Reads bytes and text lines of files, local or remote, plain or compressed."""

import bz2
import codecs
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Protocol, cast

import fsspec
import zstandard

READ_BYTES = 1 << 20  # bytes read at a time
MIN_UTF8_SHARE = 0.1  # of lines; text in other encodings is hardly ever valid UTF-8


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


def guess_encoding(chunk: bytes) -> str:
    """Return utf-8 or gb18030 for a chunk that is not ASCII and may have broken lines."""
    if _try_decode(chunk, "utf-8") is not None:
        return "utf-8"
    lines = [line for line in chunk.split(b"\n") if not line.isascii()]
    valid_utf8 = [text for line in lines if (text := _try_decode(line, "utf-8")) is not None]
    # a short Chinese word in GBK may be valid UTF-8, but of two-byte characters only
    certain_utf8 = [text for text in valid_utf8 if max(text) > "\u0800"]
    if len(certain_utf8) > MIN_UTF8_SHARE * len(lines) or len(valid_utf8) > (
        1 - MIN_UTF8_SHARE
    ) * len(lines):
        return "utf-8"
    return "gb18030" if any(_try_decode(line, "gb18030") for line in lines) else "utf-8"


def _try_decode(data: bytes, encoding: str) -> str | None:
    """Return the text without a character cut off at the end, or None if `data` is invalid."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(data)
    except UnicodeDecodeError:
        return None


def detect_encoding(chunks: Iterable[bytes]) -> str:
    """Return the encoding of a file, judged by its first chunk that is not ASCII."""
    first_non_ascii = next((chunk for chunk in chunks if not chunk.isascii()), None)
    return "utf-8" if first_non_ascii is None else guess_encoding(first_non_ascii)


def decode(data: bytes, encoding: str) -> str | BrokenRow:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        return BrokenRow(f"broken encoding at byte {error.start + 1} (read as {encoding})")


def text_lines(chunks: Iterable[bytes], encoding: str) -> Iterator[str | BrokenRow]:
    """Yield lines without line ends; `auto` detects the encoding in the first non-ASCII chunk."""
    unfinished = b""
    first = True
    for chunk in chunks:
        if encoding == "auto" and not chunk.isascii():
            encoding = guess_encoding(chunk)
        *lines, unfinished = (unfinished + chunk).split(b"\n")
        for line in lines:
            yield _decode_line(line, encoding, first)
            first = False
    if unfinished:
        yield _decode_line(unfinished, encoding, first)


def _decode_line(data: bytes, encoding: str, first: bool) -> str | BrokenRow:
    text = decode(data, "utf-8" if encoding == "auto" else encoding)  # still auto: all ASCII
    if isinstance(text, str):
        text = text.removesuffix("\r")
        return text.removeprefix("\ufeff") if first else text  # byte order mark
    return text


def read_all(chunks: Iterable[bytes], encoding: str) -> tuple[bytes, str]:
    """Return all bytes, and their encoding."""
    chunk_list = list(chunks)
    return b"".join(chunk_list), detect_encoding(chunk_list) if encoding == "auto" else encoding

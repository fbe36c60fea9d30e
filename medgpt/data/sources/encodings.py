"""Decides the encoding of a text file, or refuses to.

UTF-8 and byte order marks are certain. All other encodings are candidates: each decodes a sample of
the file, and the text that costs least (see `text_cost`) wins, if it is plausible in itself and
clearly better than every other. A wrong guess would train on mojibake, a refusal costs one line of
config.
"""

import codecs
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

from medgpt.data.sources.readings import (
    CANDIDATES,
    UTF16_CANDIDATES,
    Reading,
    foreign_encoding,
    is_certain_utf8,
    rank_readings,
)

SAMPLE_BYTES = 1 << 14  # of lines that are not ASCII
MARGIN = 9.0  # nats by which the best reading must beat the next
MAX_BROKEN_SHARE = 0.3  # of the characters beyond ASCII, in an encoding that the config names
NUM_NAMED = 3  # candidates in a refusal

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",  # begins like UTF-16's
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    b"\x84\x31\x95\x33": "gb18030",
}
NOT_TEXT = {
    b"PK\x03\x04": "an Excel or zip file",
    b"\xd0\xcf\x11\xe0": "an old or a password-protected Office file",
    b"%PDF": "a PDF file",
    b"\x1f\x8b": "a gzip file without the suffix .gz",
    b"\x28\xb5\x2f\xfd": "a zstd file without the suffix .zst",
    b"PAR1": "a Parquet file",
}
SEVEN_BIT_ESCAPES = {b"\x1b$B": "iso2022_jp", b"\x1b$@": "iso2022_jp", b"\x1b$)C": "iso2022_kr"}


class UncertainEncoding(Exception):
    """The encoding of a file is not certain, or not the named one. Never quotes the file."""


class Line(NamedTuple):
    """A line that is not ASCII, or the beginning of a long one."""

    offset: int  # of its first byte in the (decompressed) file
    data: bytes


def decide_encoding(chunks: Iterable[bytes]) -> str:
    """Return the encoding of a file, reading no more of it than needed.

    Raises:
        UncertainEncoding: no encoding is certain; names the candidates and a byte offset.
    """
    stream = iter(chunks)
    head = next((chunk for chunk in stream if chunk), b"")
    for start, what in NOT_TEXT.items():
        if head.startswith(start):
            raise UncertainEncoding(f"this is {what}, not text; name its format, or convert it")
    if (encoding := _wide_encoding(head)) is not None:
        return encoding
    sample = sample_lines(chain([head], stream))
    if not sample:
        escapes = (name for escape, name in SEVEN_BIT_ESCAPES.items() if escape in head)
        if (name := next(escapes, None)) is not None:
            raise UncertainEncoding(_refusal(head.index(b"\x1b"), [name]))
    if not sample or is_utf8(sample):
        return "utf-8"
    readings = _readings(sample)
    if (encoding := _certain(readings)) is not None:
        return encoding
    names = dict.fromkeys(reading.candidate.encoding for reading in readings)
    raise UncertainEncoding(_refusal(_first_high_byte(sample), list(names)[:NUM_NAMED]))


def check_encoding(chunks: Iterable[bytes], encoding: str) -> None:
    """Raise UncertainEncoding if the beginning of a file is not text in the encoding named."""
    stream = iter(chunks)
    head = next((chunk for chunk in stream if chunk), b"")
    codec = codecs.lookup(encoding).name
    marked = _byte_order_mark(head)
    if marked is not None and not codec.startswith(marked):
        raise UncertainEncoding(f"it begins with the byte order mark of {marked}")
    if codec.startswith(("utf-16", "utf-32")):
        _check_wide(head, encoding)
        return
    sample = sample_lines(chain([head], stream))
    if not sample:
        return
    data = b"\n".join(line.data for line in sample)
    place = f"from byte {_first_high_byte(sample)} on it looks like"
    if codec.startswith("utf-8"):
        other = None if is_utf8(sample) else _certain(_readings(sample))
    elif codec != "ascii" and is_certain_utf8(data):
        other = "utf-8"
    else:
        text = data.decode(encoding, "replace")
        num_high = len(text) - len(text.encode("ascii", "ignore"))
        if text.count("\ufffd") > MAX_BROKEN_SHARE * num_high:
            broken = (_broken_byte(line, encoding) for line in sample)
            byte = next(byte for byte in broken if byte is not None)
            raise UncertainEncoding(f"byte {byte} is not {encoding}")
        other = foreign_encoding(data, encoding)
    if other is not None:
        raise UncertainEncoding(f"{place} {other}")


def _readings(sample: Sequence[Line]) -> list[Reading]:
    # UTF-16 without a byte order mark has no zero byte if it is one line of Chinese
    wide = UTF16_CANDIDATES if len(sample) == 1 and sample[0].offset == 0 else ()
    return rank_readings(b"\n".join(line.data for line in sample), CANDIDATES + wide)


def _certain(readings: Sequence[Reading]) -> str | None:
    """Return the encoding of the best reading if it is accepted, plausible and clearly the best."""
    best = readings[0]
    others = (reading.cost for reading in readings if reading.text != best.text)
    clear = next(others, float("inf")) - best.cost >= MARGIN
    accepted = best.candidate.automatic and best.is_plausible and clear
    return best.candidate.encoding if accepted else None


def sample_lines(chunks: Iterable[bytes]) -> list[Line]:
    """Return the first lines that are not ASCII, until UTF-8 is certain or the sample is full."""
    lines: list[Line] = []
    size, offset, rest = 0, 0, b""
    for chunk in chunks:
        *complete, rest = (rest + chunk).split(b"\n")
        for line in complete:
            if not line.isascii():
                lines.append(Line(offset, line))
                size += len(line)
            offset += len(line) + 1
        if len(rest) > SAMPLE_BYTES:  # a long line: judge its beginning, skip what is ASCII of it
            if not rest.isascii():
                start = max(0, _high_byte(rest) - 64)
                lines.append(Line(offset + start, rest[start : start + SAMPLE_BYTES]))
                size += SAMPLE_BYTES
            offset, rest = offset + len(rest), b""
        if size >= SAMPLE_BYTES or (lines and is_utf8(lines)):
            return _cut_sample(lines)
    if not rest.isascii():
        lines.append(Line(offset, rest))
    return _cut_sample(lines)


def _cut_sample(lines: list[Line]) -> list[Line]:
    """Return the first lines with about SAMPLE_BYTES bytes."""
    size, kept = 0, 0
    while kept < len(lines) and size < SAMPLE_BYTES:
        size += len(lines[kept].data)
        kept += 1
    return lines[:kept]


def is_utf8(sample: Sequence[Line]) -> bool:
    """Whether more characters of a sample are valid UTF-8 than bytes are not.

    A broken line does not make a file GB18030: its text is hardly ever valid UTF-8.
    """
    text = b"\n".join(line.data for line in sample).decode("utf-8", "surrogateescape")
    broken = sum("\udc80" <= character <= "\udcff" for character in text)
    valid = sum(not character.isascii() for character in text) - broken
    return valid >= broken


def _byte_order_mark(head: bytes) -> str | None:
    return next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), None)


def _wide_encoding(head: bytes) -> str | None:
    """Return UTF-16 or the encoding of a byte order mark, or None if there is neither."""
    if (marked := _byte_order_mark(head)) is not None or b"\0" not in head:
        return marked
    data = head[: SAMPLE_BYTES // 2 * 2]
    readings = [
        reading for reading in rank_readings(data, UTF16_CANDIDATES) if reading.is_plausible
    ]
    return readings[0].candidate.encoding if readings else None


def _check_wide(head: bytes, encoding: str) -> None:
    try:
        codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError as error:
        raise UncertainEncoding(f"byte {error.start} is not {encoding}") from None


def _broken_byte(line: Line, encoding: str) -> int | None:
    """Return the offset in the file of the first byte that does not decode, or None."""
    try:
        line.data.decode(encoding)
    except UnicodeDecodeError as error:
        return line.offset + error.start
    return None


def _high_byte(data: bytes) -> int:
    """Return the position of the first byte that is not ASCII."""
    return len(data) - len(data.lstrip(bytes(range(128))))


def _first_high_byte(sample: Sequence[Line]) -> int:
    return sample[0].offset + _high_byte(sample[0].data)


def _refusal(offset: int, names: Sequence[str]) -> str:
    return (
        f"the encoding is not certain (first byte that is not ASCII: {offset}); candidates are "
        f"{', '.join(names)}"
    )

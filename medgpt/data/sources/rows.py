"""Rows of the files that a task names, and an even draw of them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import xxhash

from medgpt.config.base import ConfigError
from medgpt.config.data import SourceConfig
from medgpt.data.sources.deny import DenyList
from medgpt.data.sources.files import Broken, BrokenFile
from medgpt.data.sources.readers import read_rows, read_unit
from medgpt.data.sources.records import Record, Reject
from medgpt.data.sources.units import list_units

SHARD_MB = 1024  # files are read whole

T = TypeVar("T")


def numbered_rows(paths: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(FILE row N, row) of all files in the formats that training reads.

    Raises:
        ConfigError: there is no such file, or a row or the rest of a file cannot be read.
    """
    source = SourceConfig(name="questions", paths=tuple(paths), licence="only read")
    for unit in list_units(source, SHARD_MB):
        try:
            for number, row in read_rows(unit, source):
                place = f"{unit.file} row {number}"
                if isinstance(row, Broken):
                    raise ConfigError(f"{place}: {row.reason}; repair or remove it")
                yield place, row
        except BrokenFile as problem:
            raise ConfigError(f"{unit.file}: cannot be read further: {problem}") from None


def content_hash(*parts: str) -> str:
    """The same for the same texts."""
    return xxhash.xxh3_64_hexdigest("\x1f".join(parts).encode())


def within(text: str, part: tuple[float, float]) -> bool:
    """Whether the hash of the text, from 0 to 1, is in this part, the upper end not included."""
    place = (int(content_hash("part", text), 16) >> 11) / 2**53  # below 1
    return part[0] <= place < part[1]


def draw(items: Iterable[tuple[str, T]], limit: int | None, seed: int) -> list[T]:
    """At most `limit` of the (id, item) pairs, in their order; which ones depends on ids and seed.

    More items never change the order in which ids are taken.
    """
    pairs = list(items)
    if limit is None or len(pairs) <= limit:
        return [item for _, item in pairs]
    ranked = sorted(range(len(pairs)), key=lambda i: content_hash(str(seed), pairs[i][0]))
    return [pairs[i][1] for i in sorted(ranked[:limit])]


def records(source: SourceConfig) -> Iterator[Record]:
    """Documents and conversations of a source, without what its deny-lists set aside.

    Raises:
        ConfigError: a row is malformed.
    """
    deny = DenyList.load(source.deny)
    for unit in list_units(source, SHARD_MB):
        for record in read_unit(unit, source):
            kept = record if isinstance(record, Reject) else deny.check(record)
            if not isinstance(kept, Reject):
                yield kept
            elif kept.malformed:
                raise ConfigError(f"{kept.file} row {kept.row}: {kept.reason}")

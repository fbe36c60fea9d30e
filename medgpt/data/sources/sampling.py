"""Rows of the files that a task names, and an even draw of them."""

from collections.abc import Iterable
from typing import TypeVar

import xxhash

T = TypeVar("T")


def hash_texts(*parts: str) -> str:
    """The same for the same texts."""
    return xxhash.xxh3_64_hexdigest("\x1f".join(parts).encode())


def in_hash_range(text: str, hash_range: tuple[float, float]) -> bool:
    """Whether the hash of the text, from 0 to 1, is in this part, the upper end not included."""
    position = (int(hash_texts("part", text), 16) >> 11) / 2**53  # below 1
    return hash_range[0] <= position < hash_range[1]


def draw_subset(items: Iterable[tuple[str, T]], limit: int | None, seed: int) -> list[T]:
    """At most `limit` of the (id, item) pairs, in their order; which ones depends on ids and seed.

    More items never change the order in which ids are taken.
    """
    pairs = list(items)
    if limit is None or len(pairs) <= limit:
        return [item for _, item in pairs]
    by_hash = sorted(range(len(pairs)), key=lambda i: hash_texts(str(seed), pairs[i][0]))
    return [pairs[i][1] for i in sorted(by_hash[:limit])]

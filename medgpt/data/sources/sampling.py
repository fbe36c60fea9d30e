"""Hash-based sampling of items: independent of their order, reproducible by seed."""

from collections.abc import Iterable
from typing import TypeVar

import xxhash

T = TypeVar("T")


def hash_texts(*parts: str) -> str:
    """Return a hash of the texts as 16 hexadecimal characters."""
    return xxhash.xxh3_64_hexdigest("\x1f".join(parts).encode())


def in_hash_range(text: str, hash_range: tuple[float, float]) -> bool:
    """Whether the hash of the text, a number in [0, 1), lies in [hash_range[0], hash_range[1])."""
    position = (int(hash_texts("part", text), 16) >> 11) / 2**53  # < 1
    return hash_range[0] <= position < hash_range[1]


def draw_subset(items: Iterable[tuple[str, T]], limit: int | None, seed: int) -> list[T]:
    """Return at most `limit` items of the (id, item) pairs, in their order, chosen by id and seed.

    Adding items never changes the relative priority of the others.
    """
    pairs = list(items)
    if limit is None or len(pairs) <= limit:
        return [item for _, item in pairs]
    by_hash = sorted(range(len(pairs)), key=lambda i: hash_texts(str(seed), pairs[i][0]))
    return [pairs[i][1] for i in sorted(by_hash[:limit])]

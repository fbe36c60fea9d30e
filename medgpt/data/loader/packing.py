"""Packs chunks of samples into rows of at most `max_length` tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from medgpt.data.tokenized.index import IntArray, SampleIndex, num_chunks


@dataclass(frozen=True, kw_only=True)
class PlannedRows:
    """R packed rows without tokens. Row r holds the chunks [bounds[r], bounds[r + 1])."""

    bounds: IntArray  # (R + 1,)
    sample: IntArray  # (C,) position in the index
    repeat: IntArray  # (C,) earlier occurrences in the epoch; 0 unless sources are weighted
    chunk: IntArray  # (C,) number of the chunk within its sample
    start: IntArray  # (C,) first token
    stop: IntArray  # (C,) one past the last token

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def num_tokens(self) -> int:
        return int((self.stop - self.start).sum())


def pack_window(
    index: SampleIndex,
    samples: IntArray,
    repeats: IntArray,
    max_length: int | None,
    rng: np.random.Generator,
    *,
    packed: bool = True,
) -> PlannedRows:
    """Cut the samples of a window into chunks, pack them into rows, and shuffle the rows.

    Each chunk has a row of its own unless `packed`; each sample if max_length is None.
    """
    shuffled = rng.permutation(len(samples))
    samples, repeats = samples[shuffled], repeats[shuffled]
    if max_length is None:
        zeros = np.zeros_like(samples)
        return PlannedRows(
            bounds=np.arange(len(samples) + 1),
            sample=samples,
            repeat=repeats,
            chunk=zeros,
            start=zeros,
            stop=index.length[samples],
        )
    counts = num_chunks(index.length[samples], max_length)
    sample = np.repeat(samples, counts)
    chunk = np.arange(len(sample)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = chunk * (max_length - 1)
    stop = np.minimum(start + max_length, index.length[sample])

    row = pack_best_fit(stop - start, max_length) if packed else np.arange(len(sample))
    num_rows = int(row.max()) + 1
    row = rng.permutation(num_rows)[row]
    by_row = np.argsort(row, kind="stable")
    return PlannedRows(
        bounds=np.searchsorted(row[by_row], np.arange(num_rows + 1)),
        sample=sample[by_row],
        repeat=np.repeat(repeats, counts)[by_row],
        chunk=chunk[by_row],
        start=start[by_row],
        stop=stop[by_row],
    )


def pack_best_fit(lengths: IntArray, capacity: int) -> IntArray:
    """Return (C,) the row of each chunk. Places the longest first, in the fullest row with room.

    Best-fit decreasing (Johnson, 1973). Bit f of `rooms` is set while some row has room for f
    tokens.
    """
    row_of = np.empty(len(lengths), np.int64)
    rows_with_room: dict[int, list[int]] = {}
    rooms, num_rows = 0, 0
    for chunk in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[chunk])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            rows = rows_with_room[room]
            row = rows.pop()
            if not rows:
                rooms ^= 1 << room
        else:
            room, row = capacity, num_rows
            num_rows += 1
        row_of[chunk] = row
        if remaining := room - length:
            rows_with_room.setdefault(remaining, []).append(row)
            rooms |= 1 << remaining
    return row_of


def balance(sizes: IntArray, num_groups: int) -> IntArray:
    """Return (n,) the group of each item. Places the largest first, in the lightest group."""
    group_of = np.empty(len(sizes), np.int64)
    totals = [0] * num_groups
    for item in np.argsort(-sizes, kind="stable").tolist():
        group_of[item] = group = totals.index(min(totals))
        totals[group] += int(sizes[item])
    return group_of


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield the indices of rows of similar length, longest first.

    A batch has at most `batch_tokens` tokens, padding included (a single row may exceed it).
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch

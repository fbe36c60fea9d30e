"""The order of training data, computed instead of remembered.

An epoch is a function of (index, seed, epoch): which samples, cut into which chunks, packed into
which rows, in which order. A checkpoint therefore stores only how many steps were done.

Vocabulary: a *sample* is one record; a *chunk* is what of it fits into a row (a long document has
several, each overlapping the one before by one token, so that every token but the first is
predicted exactly once); a *row* holds chunks of at most `max_length` tokens together, or one whole
sample where samples must stay apart (preference pairs, prompts); a *step* trains
`global_batch_size` rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from medgpt.data.tokenized.index import Index, IntArray, num_chunks

WINDOW_TOKENS = 1 << 22  # samples are shuffled and packed within windows of about this many tokens
EXCHANGED = 512  # candidates on either side of the exchange that meets a source's share
VALIDATION = -1  # in place of the epoch


@dataclass(frozen=True, kw_only=True)
class Rows:
    """R packed rows. Row r holds the chunks [bounds[r], bounds[r + 1])."""

    bounds: IntArray  # (R + 1,)
    sample: IntArray  # (C,) position in the index
    visit: IntArray  # (C,) how often the epoch had this sample before; 0 but for weighted sources
    chunk: IntArray  # (C,) number of the chunk within its sample
    start: IntArray  # (C,) first token
    stop: IntArray  # (C,) one past the last token

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def num_tokens(self) -> int:
        return int((self.stop - self.start).sum())


def plan_epoch(
    index: Index,
    *,
    max_length: int | None,
    seed: int,
    epoch: int,
    weights: NDArray[np.float64] | None,
) -> Iterator[Rows]:
    """The rows of an epoch in training order, a window at a time.

    Args:
        max_length: tokens of a packed row; None gives every sample a row of its own, uncut.
        weights: (S,) share of the epoch's tokens for each source; None takes every sample once.
        epoch: from 0, or VALIDATION.
    """
    if not len(index):
        return
    order = mixed_order(index, seed=seed, epoch=epoch, weights=weights)
    visit = _visits(order) if weights is not None else np.zeros_like(order)
    window = (np.cumsum(index.length[order]) - 1) // WINDOW_TOKENS
    bounds = np.append(np.flatnonzero(np.diff(window, prepend=-1)), len(order))
    for start, stop in pairwise(bounds):
        rng = _generator(seed, epoch, 1, int(window[start]))
        yield _pack_window(index, order[start:stop], visit[start:stop], max_length, rng)


def mixed_order(
    index: Index, *, seed: int, epoch: int, weights: NDArray[np.float64] | None
) -> IntArray:
    """Samples of an epoch: sources evenly interleaved, blocks of a source in random order."""
    quotas = source_quotas(index, weights)
    positions, keys = [], []
    for source, quota in enumerate(quotas):
        picked = _pick(index, source, quota, _generator(seed, epoch, 0, source))
        positions.append(picked)
        keys.append((np.arange(len(picked)) + 0.5) / max(1, len(picked)))
    return np.concatenate(positions)[np.argsort(np.concatenate(keys), kind="stable")]


def source_quotas(index: Index, weights: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """(S,) tokens each source gives to an epoch; the epoch is as long as the data."""
    tokens = np.bincount(index.source, weights=index.length).astype(np.float64)
    return tokens if weights is None else weights / weights.sum() * tokens.sum()


def _pick(index: Index, source: int, quota: float, rng: np.random.Generator) -> IntArray:
    """Samples of one source with about `quota` tokens; whole passes first.

    Blocks come in random order and each is read once a pass; the window shuffles what is inside.
    """
    members = np.flatnonzero(index.source == source)
    tokens = int(index.length[members].sum())
    passes = []
    while len(members) and quota > 0.5:
        chosen = members if tokens <= quota else _some(index.length, members, quota, rng)
        blocks, block = np.unique(index.block[chosen], return_inverse=True)
        passes.append(chosen[np.argsort(rng.permutation(len(blocks))[block], kind="stable")])
        quota -= tokens
    return np.concatenate([members[:0], *passes])


def _some(length: IntArray, members: IntArray, quota: float, rng: np.random.Generator) -> IntArray:
    """Random members, in order, whose tokens come as near to the quota as whole samples can."""
    rest = members[rng.permutation(len(members))]
    parts = [members[:0]]
    while len(rest):
        fitting = int(np.searchsorted(np.cumsum(length[rest]), quota, side="right"))
        parts.append(rest[:fitting])
        quota -= length[rest[:fitting]].sum()
        rest = rest[fitting + 1 :]  # the next one is too long, shorter ones behind it may fit
        rest = rest[length[rest] <= quota]
    picked = np.concatenate(parts)
    others = np.setdiff1d(members, picked)
    # one exchange, 0 for none on either side, brings the sum nearest
    taken = np.append(0, length[others[:EXCHANGED]])
    given = np.append(0, length[picked[:EXCHANGED]])
    error = np.abs(quota - taken[:, None] + given)
    i, j = np.unravel_index(np.argmin(error), error.shape)
    picked = np.delete(picked, j - 1) if j else picked
    return np.sort(np.append(picked, others[i - 1]) if i else picked)


def _visits(order: IntArray) -> IntArray:
    """How often each sample stands before this place in the order."""
    by_sample = np.argsort(order, kind="stable")
    first = np.diff(order[by_sample], prepend=-1) != 0
    place = np.arange(len(order))
    visits = np.empty_like(order)
    visits[by_sample] = place - np.maximum.accumulate(np.where(first, place, 0))
    return visits


def _pack_window(
    index: Index,
    samples: IntArray,
    visits: IntArray,
    max_length: int | None,
    rng: np.random.Generator,
) -> Rows:
    """Rows of one window: samples are cut into chunks, packed, and the rows shuffled."""
    shuffled = rng.permutation(len(samples))
    samples, visits = samples[shuffled], visits[shuffled]
    if max_length is None:
        zeros = np.zeros_like(samples)
        return Rows(
            bounds=np.arange(len(samples) + 1),
            sample=samples,
            visit=visits,
            chunk=zeros,
            start=zeros,
            stop=index.length[samples],
        )
    counts = num_chunks(index.length[samples], max_length)
    sample = np.repeat(samples, counts)
    chunk = np.arange(len(sample)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = chunk * (max_length - 1)
    stop = np.minimum(start + max_length, index.length[sample])

    row = best_fit(stop - start, max_length)
    num_rows = int(row.max()) + 1
    row = rng.permutation(num_rows)[row]
    by_row = np.argsort(row, kind="stable")
    return Rows(
        bounds=np.searchsorted(row[by_row], np.arange(num_rows + 1)),
        sample=sample[by_row],
        visit=np.repeat(visits, counts)[by_row],
        chunk=chunk[by_row],
        start=start[by_row],
        stop=stop[by_row],
    )


def best_fit(lengths: IntArray, capacity: int) -> IntArray:
    """(C,) row of each piece: longest first, into the fullest row that still has room.

    Best-fit decreasing (Johnson, 1973); `free` has bit f set while some row has f tokens of room.
    """
    row_of = np.empty(len(lengths), np.int64)
    rows_with_room: dict[int, list[int]] = {}
    free, num_rows = 0, 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        fitting = free >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            rows = rows_with_room[room]
            row = rows.pop()
            if not rows:
                free ^= 1 << room
        else:
            room, row = capacity, num_rows
            num_rows += 1
        row_of[piece] = row
        if left := room - length:
            rows_with_room.setdefault(left, []).append(row)
            free |= 1 << left
    return row_of


def _generator(seed: int, epoch: int, use: int, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, epoch - VALIDATION, use, number])

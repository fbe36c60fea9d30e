"""Order of the training data, as a function of (index, seed, epoch).

The function determines the samples of an epoch, their chunks, the packing into rows and the order
of the rows. A checkpoint therefore stores only the number of steps.

A *sample* is one record. A *chunk* is the part of a sample that fits into a row; the chunks of a
long document overlap by one token, so that every token but the first is predicted exactly once. A
*row* holds chunks of at most `max_length` tokens together, or one whole sample where samples must
stay apart (preference pairs, prompts). A *step* trains `global_batch_size` rows.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from medgpt.data.loader.packing import PlannedRows, pack_window
from medgpt.data.tokenized.index import IntArray, SampleIndex

WINDOW_TOKENS = 1 << 22  # approximate tokens of a window; shuffling and packing stay inside one
MAX_SWAP_CANDIDATES = 512  # per side, for the swap that brings a source nearest to its quota
VALIDATION = -1  # epoch number of the validation split


def plan_epoch(
    index: SampleIndex,
    *,
    max_length: int | None,
    seed: int,
    epoch: int,
    weights: NDArray[np.float64] | None,
    packed: bool = True,
) -> Iterator[PlannedRows]:
    """Yield the rows of an epoch in training order, one window at a time.

    Args:
        max_length: tokens of a packed row; None gives every sample a row of its own, uncut.
        weights: (S,) relative share of the epoch's tokens per source; None uses every sample once.
        epoch: from 0, or VALIDATION.
        packed: False gives every chunk of at most max_length tokens a row of its own.
    """
    if not len(index):
        return
    order = mixed_order(index, seed=seed, epoch=epoch, weights=weights)
    repeats = _count_repeats(order) if weights is not None else np.zeros_like(order)
    window = (np.cumsum(index.length[order]) - 1) // WINDOW_TOKENS
    bounds = np.append(np.flatnonzero(np.diff(window, prepend=-1)), len(order))
    for start, stop in pairwise(bounds):
        rng = _make_rng(seed, epoch, 1, int(window[start]))
        samples = order[start:stop], repeats[start:stop]
        yield pack_window(index, *samples, max_length, rng, packed=packed)


def mixed_order(
    index: SampleIndex, *, seed: int, epoch: int, weights: NDArray[np.float64] | None
) -> IntArray:
    """Return the samples of an epoch, sources evenly interleaved, blocks in random order."""
    quotas = source_quotas(index, weights)
    positions, keys = [], []
    for source, quota in enumerate(quotas):
        picked = _pick_samples(index, source, quota, _make_rng(seed, epoch, 0, source))
        positions.append(picked)
        keys.append((np.arange(len(picked)) + 0.5) / max(1, len(picked)))
    return np.concatenate(positions)[np.argsort(np.concatenate(keys), kind="stable")]


def source_quotas(index: SampleIndex, weights: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Return (S,) tokens of each source in an epoch, which is as long as the data."""
    tokens = np.bincount(index.source, weights=index.length).astype(np.float64)
    return tokens if weights is None else weights / weights.sum() * tokens.sum()


def _pick_samples(
    index: SampleIndex, source: int, quota: float, rng: np.random.Generator
) -> IntArray:
    """Pick samples of one source with about `quota` tokens in total, after any full passes.

    Blocks come in random order, once per pass; samples are shuffled later, within a window.
    """
    members = np.flatnonzero(index.source == source)
    tokens = int(index.length[members].sum())
    passes = []
    while len(members) and quota > 0.5:
        chosen = members if tokens <= quota else _pick_subset(index.length, members, quota, rng)
        blocks, block = np.unique(index.block[chosen], return_inverse=True)
        passes.append(chosen[np.argsort(rng.permutation(len(blocks))[block], kind="stable")])
        quota -= tokens
    return np.concatenate([members[:0], *passes])


def _pick_subset(
    length: IntArray, members: IntArray, quota: float, rng: np.random.Generator
) -> IntArray:
    """Pick random members, in order, whose total tokens come nearest to the quota."""
    remaining = members[rng.permutation(len(members))]
    picked_runs = [members[:0]]
    while len(remaining):
        fitting = int(np.searchsorted(np.cumsum(length[remaining]), quota, side="right"))
        picked_runs.append(remaining[:fitting])
        quota -= length[remaining[:fitting]].sum()
        # the next one is too long, but shorter ones after it may fit
        remaining = remaining[fitting + 1 :]
        remaining = remaining[length[remaining] <= quota]
    picked = np.concatenate(picked_runs)
    unpicked = np.setdiff1d(members, picked)
    # swap one sample (index 0: none) of each side to bring the sum nearest to the quota
    added_tokens = np.append(0, length[unpicked[:MAX_SWAP_CANDIDATES]])
    removed_tokens = np.append(0, length[picked[:MAX_SWAP_CANDIDATES]])
    error = np.abs(quota - added_tokens[:, None] + removed_tokens)
    i, j = np.unravel_index(np.argmin(error), error.shape)
    picked = np.delete(picked, j - 1) if j else picked
    return np.sort(np.append(picked, unpicked[i - 1]) if i else picked)


def _count_repeats(order: IntArray) -> IntArray:
    """Return (N,) how often each sample occurs earlier in the order."""
    by_sample = np.argsort(order, kind="stable")
    first = np.diff(order[by_sample], prepend=-1) != 0
    position = np.arange(len(order))
    repeats = np.empty_like(order)
    repeats[by_sample] = position - np.maximum.accumulate(np.where(first, position, 0))
    return repeats


def _make_rng(seed: int, epoch: int, purpose: int, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, epoch - VALIDATION, purpose, number])

"""Who computes which sequences, in which forward passes. All follows from lengths alone, so every
rank knows what the others do without asking."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from medgpt.data.loader.batch import IGNORE, PackedBatch
from medgpt.data.loader.collate import empty_batch, packed_batch
from medgpt.data.loader.order import best_fit
from medgpt.rlhf.rollout_batch import Sequences

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward pass over b sequences; none on a rank that only keeps in step."""

    rows: Rows  # (b,) of the batch
    batch: PackedBatch  # labelled where a response's token is predicted, in the order of `rows`


def share_by_length(lengths: NDArray[np.int64], num_shares: int) -> list[Rows]:
    """Rows of each share, ascending; the longest first, each to the share with the least tokens."""
    load, shares = [0] * num_shares, [[] for _ in range(num_shares)]
    for row in np.argsort(-lengths, kind="stable").tolist():
        share = load.index(min(load))
        load[share] += int(lengths[row])
        shares[share].append(row)
    return [np.sort(np.array(share, np.int64)) for share in shares]


def forwards(
    sequences: Sequences, rows: Rows, *, rank: int, num_ranks: int, max_tokens: int
) -> Iterator[Forward]:
    """This rank's forward passes over its share of `rows`: as many as every other rank makes.

    Args:
        max_tokens: of a pass; a longer sequence has one of its own.
    """
    lengths = sequences.lengths[rows]
    shares = share_by_length(lengths, num_ranks)
    packed = [_pack(lengths[share], max_tokens) for share in shares]
    for number in range(max(map(len, packed))):
        if number < len(packed[rank]):
            mine = rows[shares[rank][packed[rank][number]]]
            yield Forward(mine, response_batch(sequences, mine))
        else:
            yield Forward(rows[:0], empty_batch(0))


def response_batch(sequences: Sequences, rows: Sequence[int] | Rows) -> PackedBatch:
    """Prompt and response of each row, packed; what precedes a response's token has it as label."""
    prompts, responses = sequences.prompts, sequences.responses
    ids = [part for i in rows for part in (prompts.row(i), responses.row(i))]
    input_ids = np.concatenate(ids).astype(np.int64)
    lengths = sequences.lengths[rows]
    labels = np.full_like(input_ids, IGNORE)
    labels[_before_tokens(sequences, rows)] = responses.values[responses.places(rows)]
    return packed_batch(torch.from_numpy(input_ids), torch.from_numpy(labels), lengths)


def mini_batches(
    num_rows: int, size: int, *, seed: int, iteration: int, epoch: int
) -> Iterator[Rows]:
    """Rows of each optimizer step, ascending; every row once, in a fresh order of steps."""
    order = np.random.default_rng([seed, iteration, epoch]).permutation(num_rows)
    for start in range(0, num_rows, size):
        yield np.sort(order[start : start + size])


def _before_tokens(sequences: Sequences, rows: Sequence[int] | Rows) -> Rows:
    """(n,) positions in the packed row from which the response tokens are predicted."""
    ends = np.cumsum(sequences.lengths[rows])
    counts = sequences.responses.lengths[rows]
    spans = [np.arange(e - c - 1, e - 1) for e, c in zip(ends, counts, strict=True)]
    return np.concatenate(spans or [np.empty(0, np.int64)])


def _pack(lengths: NDArray[np.int64], max_tokens: int) -> list[Rows]:
    """Places in `lengths` of each forward pass."""
    passes = [np.array([place]) for place in np.flatnonzero(lengths > max_tokens)]
    short = np.flatnonzero(lengths <= max_tokens)
    if len(short):
        bins = best_fit(lengths[short], max_tokens)
        passes += [short[bins == number] for number in range(int(bins.max()) + 1)]
    return passes

"""Who computes which sequences, in which forward passes. All follows from lengths alone, so every
rank knows what the others do without asking."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from medgpt.data.loader.batch import IGNORE, PackedBatch
from medgpt.data.loader.collate import empty_batch, packed_batch
from medgpt.data.loader.packing import pack_best_fit
from medgpt.rlhf.rollout_batch import Sequences

RowIndices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """One forward pass over b sequences; none on a rank that only keeps in step."""

    rows: RowIndices  # (b,) of the batch
    batch: PackedBatch  # labelled where a response's token is predicted, in the order of `rows`


def split_by_length(lengths: NDArray[np.int64], num_shares: int) -> list[RowIndices]:
    """Rows of each share, ascending; the longest first, each to the share with the least tokens."""
    load, shares = [0] * num_shares, [[] for _ in range(num_shares)]
    for row in np.argsort(-lengths, kind="stable").tolist():
        share = load.index(min(load))
        load[share] += int(lengths[row])
        shares[share].append(row)
    return [np.sort(np.array(share, np.int64)) for share in shares]


def forward_passes(
    sequences: Sequences, rows: RowIndices, *, rank: int, num_ranks: int, max_tokens: int
) -> Iterator[ForwardPass]:
    """This rank's forward passes over its share of `rows`: as many as every other rank makes.

    Args:
        max_tokens: of a pass; a longer sequence has one of its own.
    """
    lengths = sequences.lengths[rows]
    shares = split_by_length(lengths, num_ranks)
    passes = [_pack(lengths[share], max_tokens) for share in shares]
    for number in range(max(map(len, passes))):
        if number < len(passes[rank]):
            local_rows = rows[shares[rank][passes[rank][number]]]
            yield ForwardPass(local_rows, response_batch(sequences, local_rows))
        else:
            yield ForwardPass(rows[:0], empty_batch(0))


def response_batch(sequences: Sequences, rows: Sequence[int] | RowIndices) -> PackedBatch:
    """Prompt and response of each row, packed; what precedes a response's token has it as label."""
    prompts, responses = sequences.prompts, sequences.responses
    ids = [part for i in rows for part in (prompts.row(i), responses.row(i))]
    input_ids = np.concatenate(ids).astype(np.int64)
    lengths = sequences.lengths[rows]
    labels = np.full_like(input_ids, IGNORE)
    labels[_predicting_positions(sequences, rows)] = responses.values[responses.positions(rows)]
    return packed_batch(torch.from_numpy(input_ids), torch.from_numpy(labels), lengths)


def mini_batches(
    num_rows: int, size: int, *, seed: int, iteration: int, epoch: int
) -> Iterator[RowIndices]:
    """Rows of each optimizer step, ascending; every row once, in a fresh order of steps."""
    order = np.random.default_rng([seed, iteration, epoch]).permutation(num_rows)
    for start in range(0, num_rows, size):
        yield np.sort(order[start : start + size])


def _predicting_positions(sequences: Sequences, rows: Sequence[int] | RowIndices) -> RowIndices:
    """(n,) positions in the packed row from which the response tokens are predicted."""
    ends = np.cumsum(sequences.lengths[rows])
    counts = sequences.responses.lengths[rows]
    spans = [np.arange(e - c - 1, e - 1) for e, c in zip(ends, counts, strict=True)]
    return np.concatenate(spans or [np.empty(0, np.int64)])


def _pack(lengths: NDArray[np.int64], max_tokens: int) -> list[RowIndices]:
    """Places in `lengths` of each forward pass."""
    passes = [np.array([place]) for place in np.flatnonzero(lengths > max_tokens)]
    short = np.flatnonzero(lengths <= max_tokens)
    if len(short):
        bins = pack_best_fit(lengths[short], max_tokens)
        passes += [short[bins == number] for number in range(int(bins.max()) + 1)]
    return passes

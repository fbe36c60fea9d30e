"""Assignment of sequences to ranks and forward passes. It depends on lengths alone, so every rank
knows the plan of the others without communication."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from medgpt.data.loader.batch import IGNORE, PackedBatch
from medgpt.data.loader.collate import empty_batch, packed_batch
from medgpt.data.loader.packing import balance, batches_by_length, pack_best_fit
from medgpt.rlhf.rollout_batch import Sequences

RowIndices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """One forward pass over b sequences; b is 0 on a rank that only takes part in collectives."""

    rows: RowIndices  # (b,) rows of the batch
    batch: PackedBatch  # labels at positions that predict response tokens


def split_by_length(lengths: NDArray[np.int64], num_shares: int) -> list[RowIndices]:
    """Return the rows of each share, ascending. Longest first, each goes to the lightest share."""
    share_of = balance(lengths, num_shares)
    return [np.flatnonzero(share_of == share) for share in range(num_shares)]


def forward_passes(
    sequences: Sequences,
    rows: RowIndices,
    *,
    rank: int,
    num_ranks: int,
    max_tokens: int,
    padded: bool = False,
) -> Iterator[ForwardPass]:
    """Yield this rank's forward passes over its share of `rows`; all ranks make equally many.

    Args:
        max_tokens: limit of a pass; a longer sequence gets a pass of its own.
        padded: count the tokens of a pass as if all its sequences were as long as the longest.
    """
    lengths = sequences.lengths[rows]
    shares = split_by_length(lengths, num_ranks)
    pack = _group_by_length if padded else _pack
    passes = [pack(lengths[share], max_tokens) for share in shares]
    for number in range(max(map(len, passes))):
        if number < len(passes[rank]):
            local_rows = rows[shares[rank][passes[rank][number]]]
            yield ForwardPass(local_rows, response_batch(sequences, local_rows))
        else:
            yield ForwardPass(rows[:0], empty_batch(0))


def response_batch(sequences: Sequences, rows: Sequence[int] | RowIndices) -> PackedBatch:
    """Pack prompt and response of each row; the label of a position is the next response token."""
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
    """Yield the rows of each optimizer step, ascending; every row once per epoch, shuffled."""
    order = np.random.default_rng([seed, iteration, epoch]).permutation(num_rows)
    for start in range(0, num_rows, size):
        yield np.sort(order[start : start + size])


def _predicting_positions(sequences: Sequences, rows: Sequence[int] | RowIndices) -> RowIndices:
    """(n,) positions in the packed row that predict the response tokens."""
    ends = np.cumsum(sequences.lengths[rows])
    counts = sequences.responses.lengths[rows]
    spans = [np.arange(e - c - 1, e - 1) for e, c in zip(ends, counts, strict=True)]
    return np.concatenate(spans or [np.empty(0, np.int64)])


def _pack(lengths: NDArray[np.int64], max_tokens: int) -> list[RowIndices]:
    """Return the indices into `lengths` of each forward pass."""
    passes = [np.array([place]) for place in np.flatnonzero(lengths > max_tokens)]
    short = np.flatnonzero(lengths <= max_tokens)
    if len(short):
        bins = pack_best_fit(lengths[short], max_tokens)
        passes += [short[bins == number] for number in range(int(bins.max()) + 1)]
    return passes


def _group_by_length(lengths: NDArray[np.int64], max_tokens: int) -> list[RowIndices]:
    """Return the indices into `lengths` of each forward pass over padded sequences."""
    groups = batches_by_length(lengths.tolist(), max_tokens)
    return [np.sort(np.array(group)) for group in groups]

"""Collates packed rows into the tensors of a forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
import torch
import xxhash

from medgpt.algos.lm import mask_tokens
from medgpt.data.loader.batch import IGNORE, PackedBatch, PreferenceBatch
from medgpt.data.loader.packed_row import PackedRow

Pair = tuple[int, int, float, float]
"""(better sequence, worse sequence, margin, weight)."""


@dataclass(frozen=True, kw_only=True)
class MaskingSettings:
    """Settings of masked language modeling; see `algos.lm.mask_tokens`."""

    mask_id: int
    vocab_size: int
    probability: float
    special_ids: tuple[int, ...]


def sequence_seed(seed: int, epoch: int, sample_id: str, chunk: int, repeat: int = 0) -> int:
    """Return the seed of everything random in a sequence, independent of its worker.

    `repeat` counts earlier occurrences in the epoch, so that a repeated sample gets other masks.
    """
    key = f"{seed}:{epoch}:{sample_id}:{chunk}" + (f":{repeat}" if repeat else "")
    return xxhash.xxh3_64_intdigest(key.encode()) >> 1


def sequence_seeds(rows: Sequence[PackedRow], *, seed: int, epoch: int) -> list[int]:
    """Return (S,) seeds of the sequences of a batch, in order."""
    return [
        sequence_seed(seed, epoch, *chunk_key)
        for row in rows
        for chunk_key in zip(row.sample_ids, row.chunks, row.repeat, strict=True)
    ]


def causal_batch(rows: Sequence[PackedRow]) -> PackedBatch:
    """Batch for causal language modeling: a position predicts the next token if it is a target."""
    input_ids = np.concatenate([row.input_ids for row in rows]).astype(np.int64)
    targets = np.concatenate([row.targets for row in rows])
    lengths = np.concatenate([row.lengths for row in rows])
    labels = np.full_like(input_ids, IGNORE)
    labels[:-1] = np.where(targets[1:], input_ids[1:], IGNORE)
    labels[np.cumsum(lengths) - 1] = IGNORE  # the last token of a sequence has no next one
    return packed_batch(torch.from_numpy(input_ids), torch.from_numpy(labels), lengths)


def masked_batch(
    rows: Sequence[PackedRow], masking: MaskingSettings, seeds: Sequence[int]
) -> PackedBatch:
    """Batch for masked language modeling. The masks depend on the (S,) seeds only."""
    input_ids, labels = [], []
    special = torch.tensor(masking.special_ids)
    for row in rows:
        bounds = np.append(0, np.cumsum(row.lengths))
        for start, stop, chunk in zip(bounds[:-1], bounds[1:], row.chunks, strict=True):
            ids = torch.from_numpy(row.input_ids[start:stop].astype(np.int64))[None]
            unmaskable = torch.isin(ids, special)
            if chunk:
                unmaskable[:, 0] = True  # the previous chunk ends with this token and may mask it
            word_ids = None
            if row.word_ids is not None:
                word_ids = torch.from_numpy(row.word_ids[start:stop].astype(np.int64))[None]
            masked = mask_tokens(
                ids,
                unmaskable,
                mask_id=masking.mask_id,
                vocab_size=masking.vocab_size,
                mlm_probability=masking.probability,
                generator=torch.Generator().manual_seed(seeds[len(labels)]),
                word_ids=word_ids,
            )
            input_ids.append(masked[0][0])
            labels.append(masked[1][0])
    lengths = np.concatenate([row.lengths for row in rows])
    return packed_batch(torch.cat(input_ids), torch.cat(labels), lengths)


def preference_batch(rows: Sequence[PackedRow]) -> PreferenceBatch:
    """Batch of all answers, and of all pairs of answers to a prompt with different grades."""
    pairs: list[Pair] = []
    first_sequence = 0  # sequence of the prompt's first answer
    for row in rows:
        assert row.grades is not None
        grades = row.grades.tolist()
        for i, j in combinations(range(len(grades)), 2):
            if grades[i] != grades[j]:
                best, worst = (i, j) if grades[i] > grades[j] else (j, i)
                margin, weight = grades[best] - grades[worst], 1 / comb(len(grades), 2)
                pairs.append((first_sequence + best, first_sequence + worst, margin, weight))
        first_sequence += len(grades)
    return _compare(_answers_batch(rows), pairs, num_prompts=len(rows))


def empty_preference_batch(token_id: int) -> PreferenceBatch:
    """Batch without prompts, for a worker without rows to stay in step with the others."""
    return _compare(empty_batch(token_id), [], num_prompts=0)


def _compare(packed: PackedBatch, pairs: Sequence[Pair], *, num_prompts: int) -> PreferenceBatch:
    better, worse, margins, weights = zip(*pairs, strict=True) if pairs else ((), (), (), ())
    return PreferenceBatch(
        packed=packed,
        better=torch.tensor(better, dtype=torch.int64),
        worse=torch.tensor(worse, dtype=torch.int64),
        margins=torch.tensor(margins, dtype=torch.float32),
        weights=torch.tensor(weights, dtype=torch.float32),
        num_prompts=num_prompts,
    )


def _answers_batch(rows: Sequence[PackedRow]) -> PackedBatch:
    """Batch with a sequence for each answer, without labels."""
    input_ids = torch.from_numpy(np.concatenate([row.input_ids for row in rows]).astype(np.int64))
    lengths = np.concatenate([_answer_lengths(row) for row in rows]).astype(np.int64)
    return packed_batch(input_ids, torch.full_like(input_ids, IGNORE), lengths)


def _answer_lengths(row: PackedRow) -> np.ndarray:
    assert row.sequence_lengths is not None
    return row.sequence_lengths


def empty_batch(token_id: int) -> PackedBatch:
    """Batch of two tokens without labels, for a worker without rows to stay in step."""
    ids = torch.full((2,), token_id)
    return packed_batch(ids, torch.full_like(ids, IGNORE), np.array([2]))


def packed_batch(input_ids: torch.Tensor, labels: torch.Tensor, lengths: np.ndarray) -> PackedBatch:
    """Batch of concatenated sequences: input_ids and labels (N,), lengths (S,)."""
    bounds = np.append(0, np.cumsum(lengths))
    positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
    return PackedBatch(
        input_ids=input_ids[None],
        position_ids=torch.from_numpy(positions)[None],
        labels=labels[None],
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        max_seqlen=int(lengths.max()),
    )

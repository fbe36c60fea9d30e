"""Packed rows to the tensors of a forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash

from medgpt.algos.lm import mask_tokens
from medgpt.data.batch import IGNORE, PackedBatch

if TYPE_CHECKING:  # a worker without a stream does without Ray Data
    from medgpt.data.stream import Row


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Masked language modelling; see `algos.lm.mask_tokens`."""

    mask_id: int
    vocab_size: int
    probability: float
    special_ids: tuple[int, ...]


def piece_seed(seed: int, epoch: int, sample_id: str, chunk: int, visit: int = 0) -> int:
    """Seed of everything random inside a piece, whichever worker trains it.

    `visit`: how often the epoch had the sample before; a repeated one gets other masks.
    """
    key = f"{seed}:{epoch}:{sample_id}:{chunk}" + (f":{visit}" if visit else "")
    return xxhash.xxh3_64_intdigest(key.encode()) >> 1


def piece_seeds(rows: Sequence["Row"], *, seed: int, epoch: int) -> list[int]:
    """(S,) seeds of the pieces of a batch, in order."""
    return [
        piece_seed(seed, epoch, *piece)
        for row in rows
        for piece in zip(row.sample_ids, row.chunks, row.visits, strict=True)
    ]


def causal_batch(rows: Sequence["Row"]) -> PackedBatch:
    """Every position predicts the next token of its piece, where that is to be learnt."""
    input_ids = np.concatenate([row.input_ids for row in rows]).astype(np.int64)
    targets = np.concatenate([row.targets for row in rows])
    lengths = np.concatenate([row.lengths for row in rows])
    labels = np.full_like(input_ids, IGNORE)
    labels[:-1] = np.where(targets[1:], input_ids[1:], IGNORE)
    labels[np.cumsum(lengths) - 1] = IGNORE  # the last token of a piece has no next one
    return packed_batch(torch.from_numpy(input_ids), torch.from_numpy(labels), lengths)


def masked_batch(rows: Sequence["Row"], masking: Masking, seeds: Sequence[int]) -> PackedBatch:
    """Masked tokens predict themselves; the masks depend on the pieces' seeds only."""
    input_ids, labels = [], []
    special = torch.tensor(masking.special_ids)
    for row in rows:
        bounds = np.append(0, np.cumsum(row.lengths))
        for start, stop, chunk in zip(bounds[:-1], bounds[1:], row.chunks, strict=True):
            ids = torch.from_numpy(row.input_ids[start:stop].astype(np.int64))[None]
            kept = torch.isin(ids, special)
            if chunk:
                kept[:, 0] = True  # the chunk before ends with this token and may mask it
            words = None
            if row.word_ids is not None:
                words = torch.from_numpy(row.word_ids[start:stop].astype(np.int64))[None]
            masked = mask_tokens(
                ids,
                kept,
                mask_id=masking.mask_id,
                vocab_size=masking.vocab_size,
                mlm_probability=masking.probability,
                generator=torch.Generator().manual_seed(seeds[len(labels)]),
                word_ids=words,
            )
            input_ids.append(masked[0][0])
            labels.append(masked[1][0])
    lengths = np.concatenate([row.lengths for row in rows])
    return packed_batch(torch.cat(input_ids), torch.cat(labels), lengths)


def empty_batch(token_id: int) -> PackedBatch:
    """Two tokens without a label: what a worker without rows computes to keep in step."""
    ids = torch.full((2,), token_id)
    return packed_batch(ids, torch.full_like(ids, IGNORE), np.array([2]))


def packed_batch(input_ids: torch.Tensor, labels: torch.Tensor, lengths: np.ndarray) -> PackedBatch:
    """Pieces (N,) of these lengths (S,), end to end, with what each position must predict (N,)."""
    bounds = np.append(0, np.cumsum(lengths))
    positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
    return PackedBatch(
        input_ids=input_ids[None],
        position_ids=torch.from_numpy(positions)[None],
        labels=labels[None],
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        max_seqlen=int(lengths.max()),
    )

"""Input of a forward pass: packed sequences, flattened to one row of tokens."""

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """S sequences with N tokens in total. No sequence attends to another."""

    input_ids: Tensor  # (1, N) int64
    position_ids: Tensor  # (1, N) int64, restarts at 0 in each sequence
    labels: Tensor  # (1, N) int64, target of the position; IGNORE = no loss
    cu_seqlens: Tensor  # (S + 1,) int32, sequence s is [cu_seqlens[s], cu_seqlens[s + 1])
    max_seqlen: int  # tokens of the longest sequence

    @property
    def num_targets(self) -> int:
        """Number of positions where the loss counts."""
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device) -> "PackedBatch":
        return _to(self, device)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceBatch:
    """All answers to some prompts, one sequence each, and the M pairs that compare them."""

    packed: PackedBatch  # without labels
    better: Tensor  # (M,) int64, sequence of the better answer of each pair
    worse: Tensor  # (M,) int64, sequence of the worse answer
    margins: Tensor  # (M,) float32 > 0, difference of the two grades
    weights: Tensor  # (M,) float32, 1 / C(K, 2) for a prompt with K answers
    num_prompts: int

    @property
    def num_targets(self) -> int:
        """Number of prompts, the denominator of the loss."""
        return self.num_prompts

    def to(self, device: torch.device) -> "PreferenceBatch":
        return _to(self, device)


Batch = TypeVar("Batch", PackedBatch, PreferenceBatch)


def _to(batch: Batch, device: torch.device) -> Batch:
    """Copy all tensors to a device."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    moved = {name: v if isinstance(v, int) else v.to(device) for name, v in values.items()}
    return replace(batch, **moved)

"""Input of a forward pass: packed sequences, flattened to one row of tokens."""

from dataclasses import dataclass

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
        return PackedBatch(
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            labels=self.labels.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
            max_seqlen=self.max_seqlen,
        )


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
        return PreferenceBatch(
            packed=self.packed.to(device),
            better=self.better.to(device),
            worse=self.worse.to(device),
            margins=self.margins.to(device),
            weights=self.weights.to(device),
            num_prompts=self.num_prompts,
        )

"""Dropout whose masks depend on the sequences of a packed batch, not on their place in it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_GOLDEN = 0x9E3779B97F4A7C15  # spreads layer numbers over 64 bits, as in splitmix64
_LARGEST_SEED = 2**63 - 1


class SequenceDropout(nn.Module):
    """Zeroes inputs (1, N, H) with probability `p` and scales the others by 1 / (1 - p).

    The mask of a sequence depends only on its seed, its length and `layer`, not on the worker, the
    neighbors or activation checkpointing. The caller sets `lengths` and `seeds` before a forward.
    """

    def __init__(self, p: float, layer: int) -> None:
        super().__init__()
        self.p, self.layer = p, layer
        self.lengths: list[int] = []
        self.seeds: Sequence[int] = ()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        keep = torch.empty_like(x[0], requires_grad=False)
        generator = torch.Generator(x.device)
        for sequence, seed in zip(keep.split(self.lengths), self.seeds, strict=True):
            generator.manual_seed((seed ^ (self.layer + 1) * _GOLDEN) & _LARGEST_SEED)
            sequence.bernoulli_(1 - self.p, generator=generator)
        return x * keep[None] / (1 - self.p)

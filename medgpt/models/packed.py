"""Run the backbone of a Hugging Face model, with LoRA's dropout, on a packed batch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medgpt.data.loader.batch import PackedBatch

if TYPE_CHECKING:
    from peft import PeftModel


_GOLDEN = 0x9E3779B97F4A7C15  # spreads layer numbers over 64 bits, as in splitmix64
_LARGEST_SEED = 2**63 - 1


def unwrap_peft(model: "PreTrainedModel | PeftModel") -> PreTrainedModel:
    """Return the Hugging Face model, including its LoRA layers if there are any."""
    base = model if isinstance(model, PreTrainedModel) else model.get_base_model()
    return cast(PreTrainedModel, base)


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


class PackedModel(nn.Module):
    """A Hugging Face model, possibly with LoRA, whose backbone runs on packed batches."""

    def __init__(
        self, model: "PreTrainedModel | PeftModel", *, activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self._dropouts = [m for m in model.modules() if isinstance(m, SequenceDropout)]
        if activation_checkpointing:
            self.pretrained.activation_checkpointing_enable({"use_reentrant": False})

    @property
    def pretrained(self) -> PreTrainedModel:
        """The Hugging Face model, including its LoRA layers if there are any."""
        return unwrap_peft(self.model)

    def hidden_states(
        self, batch: PackedBatch, seeds: Sequence[int] | None, **inputs: Any
    ) -> Tensor:
        """Return the last hidden state (N, H).

        Args:
            seeds: S seeds, one per sequence, for LoRA's dropout in training.
            inputs: may be inputs_embeds (1, N, H), which replaces the batch's ids.
        """
        if self.training and self._dropouts:
            assert seeds is not None, "dropout needs a seed per sequence"
            lengths = batch.cu_seqlens.diff().tolist()
            for layer in self._dropouts:
                layer.lengths, layer.seeds = lengths, seeds
        output = self.pretrained.base_model(
            **(inputs or {"input_ids": batch.input_ids}),
            position_ids=batch.position_ids,
            use_cache=False,
            cu_seq_lens_q=batch.cu_seqlens,
            cu_seq_lens_k=batch.cu_seqlens,
            max_length_q=batch.max_seqlen,
            max_length_k=batch.max_seqlen,
        )
        return output.last_hidden_state[0]

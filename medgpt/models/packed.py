"""Run the body of a Hugging Face model, with LoRA's dropout, on a packed batch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from medgpt.data.loader.batch import PackedBatch
from medgpt.models.attention import VARLEN

if TYPE_CHECKING:
    from peft import PeftModel


PACKED_ATTENTION = (VARLEN, "flash_attention_2")  # keeps the sequences of one row apart
_GOLDEN = 0x9E3779B97F4A7C15  # spreads layer numbers over 64 bits, as in splitmix64
_LARGEST_SEED = 2**63 - 1


def unwrap_peft(model: "PreTrainedModel | PeftModel") -> PreTrainedModel:
    """Return the Hugging Face model, including its LoRA layers if there are any."""
    base = model if isinstance(model, PreTrainedModel) else model.get_base_model()
    return cast(PreTrainedModel, base)


class SequenceDropout(nn.Module):
    """Zeroes inputs with probability `p` and scales the others by 1 / (1 - p).

    The mask of a sequence depends only on its seed, its length and `layer`, not on the worker, the
    neighbors or activation checkpointing. The caller sets `lengths` and `seeds` before a forward.
    """

    def __init__(self, p: float, layer: int) -> None:
        super().__init__()
        self.p, self.layer = p, layer
        self.lengths: list[int] = []
        self.seeds: Sequence[int] = ()

    def forward(self, x: Tensor) -> Tensor:
        """Return the shape of `x`: packed (1, N, H), or padded on the right (S, L, H)."""
        if not self.training or not self.p:
            return x
        keep = torch.zeros_like(x, requires_grad=False)
        generator = torch.Generator(x.device)
        for sequence, seed in zip(split_sequences(keep, self.lengths), self.seeds, strict=True):
            generator.manual_seed((seed ^ (self.layer + 1) * _GOLDEN) & _LARGEST_SEED)
            sequence.bernoulli_(1 - self.p, generator=generator)
        return x * keep / (1 - self.p)


def split_sequences(x: Tensor, lengths: Sequence[int]) -> Sequence[Tensor]:
    """Return views (L, ...) of the sequences in `x`: packed (1, N, ...), or padded (S, L, ...)."""
    if len(x) == len(lengths) > 1:
        return [row[:length] for row, length in zip(x, lengths, strict=True)]
    return x[0].split(list(lengths))


class PackedModel(nn.Module):
    """A Hugging Face model, possibly with LoRA, whose body runs on packed batches.

    The sequences of a batch run as one row if the model's attention keeps them apart; else each
    runs in a row of its own, padded on the right. `models.layout` finds out which is exact.
    """

    def __init__(
        self, model: "PreTrainedModel | PeftModel", *, activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.body_output: type = BaseModelOutput  # of the latest forward
        self._dropouts = [m for m in model.modules() if isinstance(m, SequenceDropout)]
        if activation_checkpointing:
            self.pretrained.activation_checkpointing_enable({"use_reentrant": False})

    @property
    def pretrained(self) -> PreTrainedModel:
        """The Hugging Face model, including its LoRA layers if there are any."""
        return unwrap_peft(self.model)

    @property
    def is_padded(self) -> bool:
        """Whether each sequence of a batch gets a row as long as the longest one."""
        return self.pretrained.config._attn_implementation not in PACKED_ATTENTION

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
        inputs = inputs or {"input_ids": batch.input_ids}
        if self.is_padded:
            return self._padded_hidden_states(batch, inputs)
        output = self.pretrained.base_model(
            **inputs,
            position_ids=batch.position_ids,
            use_cache=False,
            cu_seq_lens_q=batch.cu_seqlens,
            cu_seq_lens_k=batch.cu_seqlens,
            max_length_q=batch.max_seqlen,
            max_length_k=batch.max_seqlen,
        )
        self.body_output = type(output)
        return output.last_hidden_state[0]

    def _padded_hidden_states(self, batch: PackedBatch, inputs: dict[str, Tensor]) -> Tensor:
        """Return the last hidden state (N, H) from one forward of S rows of L tokens."""
        slots = torch.arange(batch.max_seqlen, device=batch.cu_seqlens.device)
        is_token = slots < batch.cu_seqlens.diff()[:, None]  # (S, L)
        rows = {}
        for name, packed in inputs.items():
            rows[name] = packed.new_zeros(*is_token.shape, *packed.shape[2:])
            rows[name][is_token] = packed[0]
        output = self.pretrained.base_model(**rows, attention_mask=is_token.long(), use_cache=False)
        self.body_output = type(output)
        return output.last_hidden_state[is_token]

"""Run the backbone of a Hugging Face model on a packed batch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from medgpt.data.loader.batch import PackedBatch
from medgpt.models.dropout import SequenceDropout

if TYPE_CHECKING:
    from peft import PeftModel


def unwrap_peft(model: "PreTrainedModel | PeftModel") -> PreTrainedModel:
    """Return the Hugging Face model, including its LoRA layers if there are any."""
    base = model if isinstance(model, PreTrainedModel) else model.get_base_model()
    return cast(PreTrainedModel, base)


def run_backbone(model: PreTrainedModel, batch: PackedBatch, **inputs: Any) -> Tensor:
    """Return the last hidden state (N, H). `inputs` may be inputs_embeds (1, N, H) for the ids."""
    output = model.base_model(
        **(inputs or {"input_ids": batch.input_ids}),
        position_ids=batch.position_ids,
        use_cache=False,
        cu_seq_lens_q=batch.cu_seqlens,
        cu_seq_lens_k=batch.cu_seqlens,
        max_length_q=batch.max_seqlen,
        max_length_k=batch.max_seqlen,
    )
    return output.last_hidden_state[0]


class SequenceDropouts:
    """All SequenceDropout layers of a module; they need the sequences of a batch before it runs."""

    def __init__(self, module: nn.Module) -> None:
        self.layers = [m for m in module.modules() if isinstance(m, SequenceDropout)]

    def prepare(self, batch: PackedBatch, seeds: Sequence[int] | None) -> None:
        """Set the sequence lengths and `seeds`, one per sequence (S), of the next forward."""
        if not self.layers:
            return
        assert seeds is not None, "dropout needs a seed per sequence"
        lengths = batch.cu_seqlens.diff().tolist()
        for layer in self.layers:
            layer.lengths, layer.seeds = lengths, seeds

"""A causal or masked language model for training: a packed batch in, a loss out."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from medgpt.algos.lm import causal_lm_loss
from medgpt.config.base import ConfigError
from medgpt.data.loader.batch import IGNORE, PackedBatch
from medgpt.models.packed import PackedModel

if TYPE_CHECKING:
    from peft import PeftModel


class LanguageModel(PackedModel):
    """Runs the output layer and the loss only on positions with a label, in chunks of tokens.

    Args:
        model: a Hugging Face model with a language-model head, or the same with LoRA.
        loss_chunk_tokens: maximum number of tokens per call of the output layer.
        max_batch_tokens: tokens of the largest micro-batch. If given, every forward runs the same
            number of chunks, as ZeRO-3 requires of all ranks; else as many as the labels need.
        activation_checkpointing: recompute activations in the backward pass.
        neftune_alpha: scale of the noise on embeddings in training
            (https://arxiv.org/abs/2310.05914); 0 is off.
    """

    def __init__(
        self,
        model: "PreTrainedModel | PeftModel",
        *,
        loss_chunk_tokens: int = 8192,
        max_batch_tokens: int | None = None,
        activation_checkpointing: bool = False,
        neftune_alpha: float = 0.0,
    ) -> None:
        super().__init__(model, activation_checkpointing=activation_checkpointing)
        self.loss_chunk_tokens = loss_chunk_tokens
        self.max_batch_tokens = max_batch_tokens
        self.neftune_alpha = neftune_alpha
        check_has_body(self.pretrained)  # now rather than in the first step

    def forward(
        self,
        batch: PackedBatch,
        *,
        num_tokens: Tensor | int,
        noise_seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """Return () float32: the batch's cross-entropy in nats, summed and divided by `num_tokens`.

        A batch without labels yields exactly 0 with a gradient path to every weight, so that a
        rank without data takes part in the collectives.

        Args:
            num_tokens: labels in the global batch.
            noise_seeds: S seeds, one per sequence, for NEFTune and dropout.
        """
        loss = partial(causal_lm_loss, num_tokens=num_tokens, overwrite=True)
        return torch.stack(
            self._map_label_chunks(loss, batch, label_positions(batch), noise_seeds)
        ).sum()

    def _map_label_chunks(
        self,
        compute: Callable[[Tensor, Tensor], Tensor],
        batch: PackedBatch,
        positions: Tensor,
        noise_seeds: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Return `compute(logits, labels)` of each chunk of the `positions` (M,)."""
        inputs, labels = self._noisy_embeddings(batch, noise_seeds), batch.labels[0]
        hidden = self.hidden_states(batch, noise_seeds, **inputs)
        if len(positions) < len(labels):
            hidden, labels = hidden.index_select(0, positions), labels[positions]
        sizes = self._chunk_sizes(len(positions))
        chunks = zip(hidden.split(sizes), labels.split(sizes), strict=True)

        def run(hidden: Tensor, labels: Tensor) -> Any:
            return compute(logits_of(self.pretrained, hidden, self.body_output), labels)

        if len(sizes) > 1:  # the backward pass computes a chunk's logits again
            return [checkpoint(run, *chunk, use_reentrant=False) for chunk in chunks]
        return [run(*chunk) for chunk in chunks]

    def _chunk_sizes(self, num_positions: int) -> list[int]:
        assert self.max_batch_tokens is None or num_positions <= self.max_batch_tokens
        num_chunks = -(-(self.max_batch_tokens or num_positions) // self.loss_chunk_tokens)
        size, longer = divmod(num_positions, num_chunks)
        return [size + (i < longer) for i in range(num_chunks)]

    def _noisy_embeddings(
        self, batch: PackedBatch, seeds: Sequence[int] | None
    ) -> dict[str, Tensor]:
        """Return the embeddings with NEFTune's noise in training, else nothing."""
        if not (self.training and self.neftune_alpha):
            return {}
        assert seeds is not None, "NEFTune needs a seed per sequence"
        embeddings = self.pretrained.get_input_embeddings()(batch.input_ids)
        noise = neftune_noise(embeddings, batch.cu_seqlens, self.neftune_alpha, seeds)
        return {"inputs_embeds": embeddings + noise}


def label_positions(batch: PackedBatch) -> Tensor:
    """Return the positions (M,) with a label; position 0 if there is none, so that M > 0."""
    positions = (batch.labels[0] != IGNORE).nonzero()[:, 0]
    return positions if len(positions) else positions.new_zeros(1)


class GivenOutput(nn.Module):
    """Stands in for the body of a model: returns an output that was computed before."""

    def __init__(self, body: nn.Module, output: Any) -> None:
        super().__init__()
        self.__dict__ |= {"body": body, "output": output}  # not as a submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output

    def __getattr__(self, name: str) -> Any:
        if name == "decoder":  # what some models call in place of their body
            return self
        return getattr(self.__dict__["body"], name)


def logits_of(model: PreTrainedModel, hidden: Tensor, body_output: type) -> Tensor:
    """Return the logits (M, V) of hidden states (M, H), as the model's own forward computes them.

    That forward may scale or cap the logits, or have several output layers. Its body is replaced
    for the call.

    Args:
        body_output: class of what the body returns, as `PackedModel.body_output`.
    """
    name = model.base_model_prefix
    body = model.get_submodule(name)
    model.add_module(name, GivenOutput(body, body_output(last_hidden_state=hidden[None])))
    try:
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        return model.forward(input_ids=ids).logits[0]
    finally:
        model.add_module(name, body)


def check_has_body(model: PreTrainedModel) -> None:
    """Raise ConfigError if the model is not a body followed by output layers."""
    if model.base_model is model or model.base_model_prefix not in dict(model.named_children()):
        raise ConfigError(
            f"model.name: {type(model).__name__} is not a body followed by an output layer, as "
            "training needs; use a model like Qwen, Llama, Mistral or BERT"
        )


def neftune_noise(
    embeddings: Tensor, cu_seqlens: Tensor, alpha: float, seeds: Sequence[int]
) -> Tensor:
    """Return (1, N, H) uniform noise within +-alpha / sqrt(L * H) for sequences of L tokens.

    Jain et al., 2023, https://arxiv.org/abs/2310.05914, algorithm 1. The noise of a sequence
    depends only on its seed and length, not on its worker or neighbors.
    """
    width = embeddings.shape[-1]
    noise = torch.empty_like(embeddings[0], requires_grad=False)
    generator = torch.Generator(embeddings.device)
    sequences = noise.split(cu_seqlens.diff().tolist())
    for sequence_noise, seed in zip(sequences, seeds, strict=True):
        bound = alpha / (len(sequence_noise) * width) ** 0.5
        sequence_noise.uniform_(-bound, bound, generator=generator.manual_seed(seed))
    return noise[None]

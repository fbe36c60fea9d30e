"""Bytes that a forward pass saves for the backward pass, and buffers of passes that save nothing.

Counted as in Korthikanti et al., 2022 (arXiv 2205.05198), section 4.1: every tensor that an
operation of transformers' models and medgpt's attention saves; no dropout, no N x N matrix of
attention weights. b is the bytes of a number: 2 for bf16, 4 for fp32.
"""

from dataclasses import dataclass

from medgpt.models.model_shapes import ModelShape


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The largest micro-batch of a worker."""

    num_tokens: int
    num_labels: int
    """Positions for which logits are computed."""
    loss_chunk_tokens: int
    """Positions whose logits exist at the same time."""
    activation_checkpointing: bool
    """Whether activations are recomputed in the backward pass."""


def saved_per_layer(model: ModelShape, b: int) -> int:
    """Return bytes per token that one layer saves.

    A decoder layer saves, for each of two norms, its input in fp32, its output before and after its
    weights, and one number; queries, keys and values; the attention output per sequence and
    concatenated; four times the feed-forward width (gate, activation, up, product). An encoder
    layer saves the same for attention, inputs and outputs of two norms, and the feed-forward width
    before and after its activation.
    """
    heads = model.num_heads * model.head_dim
    keys = model.num_kv_heads * model.head_dim
    attention = b * (3 * heads + 2 * keys) + 4 * model.num_heads  # and the logsumexp of each head
    if model.has_gated_mlp:
        norms = 2 * (model.hidden_size * (4 + 2 * b) + 4)
        return attention + norms + 4 * b * model.intermediate_size
    norms = 4 * (b * model.hidden_size + 4)
    return attention + norms + 2 * b * model.intermediate_size


def saved_outside_layers(model: ModelShape, b: int) -> int:
    """Return bytes per token saved outside of the layers: the last norm and the rotary embedding of
    a decoder; the embedding norm and the head before the output layer of an encoder."""
    if model.has_gated_mlp:
        return model.hidden_size * (4 + 2 * b) + 4 + 2 * b * model.head_dim + 8
    return b * 5 * model.hidden_size + 40


def saved_activations(model: ModelShape, batch: MicroBatch, b: int) -> int:
    """Return bytes that a forward pass saves, without the output layer.

    With checkpointing each layer saves only its input, and one layer at a time is recomputed.
    """
    layer = batch.num_tokens * saved_per_layer(model, b)
    outside = batch.num_tokens * saved_outside_layers(model, b)
    if batch.activation_checkpointing:
        return model.num_layers * batch.num_tokens * b * model.hidden_size + layer + outside
    return model.num_layers * layer + outside


def logits_bytes(model: ModelShape, batch: MicroBatch, b: int) -> int:
    """Return bytes of the logits of a chunk and of their gradient, which replaces them in fp32.

    `algos.logprobs` saves nothing else of this size. Further chunks are recomputed one by one.
    """
    copies = 1 if b == 4 else 2
    return copies * b * min(batch.num_labels, batch.loss_chunk_tokens) * model.vocab_size


def backward_buffers(model: ModelShape, batch: MicroBatch, b: int) -> int:
    """Return bytes of buffers in the backward pass of a layer: three gradients of the feed-forward
    width, two of the residual stream, and one of the largest matrix."""
    wide = 3 * model.intermediate_size + 2 * model.hidden_size
    return b * (batch.num_tokens * wide + model.hidden_size * model.intermediate_size)


def forward_buffers(model: ModelShape, tokens: int, b: int) -> int:
    """Return bytes at the widest point of a pass that saves nothing: residual stream, norm, and the
    two halves of the feed-forward layer with their product."""
    wide = 3 * model.intermediate_size if model.has_gated_mlp else 2 * model.intermediate_size
    return tokens * (b * (2 * model.hidden_size + wide) + 4 * model.hidden_size)


def kv_cache_bytes(model: ModelShape, tokens: int, b: int) -> int:
    """Return bytes of the keys and values of this many tokens in all layers."""
    return tokens * model.num_layers * 2 * model.num_kv_heads * model.head_dim * b

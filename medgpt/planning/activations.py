"""What a forward pass leaves for the backward pass, and what runs without one need.

Counted as in Korthikanti et al., 2022 (arXiv 2205.05198), section 4.1: each tensor that an
operation saves, in the operations that transformers' models and medgpt's attention run: no dropout,
no N x N matrix of attention weights. b is the bytes of a number: 2 in bf16, 4 in fp32.
"""

from dataclasses import dataclass

from medgpt.models.model_shapes import ModelShape


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The largest micro-batch of a worker."""

    num_tokens: int
    num_labels: int
    """Positions that the output layer runs on."""
    loss_chunk_tokens: int
    """Of these at a time."""
    activation_checkpointing: bool
    """Activations are computed again in the backward pass."""


def saved_per_layer(model: ModelShape, b: int) -> int:
    """Bytes a token of one layer.

    A decoder has twice a norm: its input in fp32, its result before and after its weights, and a
    number; queries, keys and values; the attention's output by piece, and all together; four times
    the feed-forward width (gate, its activation, up, their product). An encoder normalises after:
    its attention as above, the inputs and outputs of two norms, the feed-forward layer before and
    after its activation.
    """
    heads = model.num_heads * model.head_dim
    keys = model.num_kv_heads * model.head_dim
    attention = b * (3 * heads + 2 * keys) + 4 * model.num_heads  # and a number for each head
    if model.has_gated_mlp:
        norms = 2 * (model.hidden_size * (4 + 2 * b) + 4)
        return attention + norms + 4 * b * model.intermediate_size
    norms = 4 * (b * model.hidden_size + 4)
    return attention + norms + 2 * b * model.intermediate_size


def saved_outside_layers(model: ModelShape, b: int) -> int:
    """Bytes a token outside of the layers: a decoder's last norm and its positions' rotation; an
    encoder's embedding norm and what its head has before the output layer."""
    if model.has_gated_mlp:
        return model.hidden_size * (4 + 2 * b) + 4 + 2 * b * model.head_dim + 8
    return b * 5 * model.hidden_size + 40


def saved_activations(model: ModelShape, batch: MicroBatch, b: int) -> int:
    """Bytes that a forward pass keeps, the output layer's not counted.

    With checkpointing each layer keeps its input alone, and one is computed again at a time.
    """
    layer = batch.num_tokens * saved_per_layer(model, b)
    outside = batch.num_tokens * saved_outside_layers(model, b)
    if batch.activation_checkpointing:
        return model.num_layers * batch.num_tokens * b * model.hidden_size + layer + outside
    return model.num_layers * layer + outside


def logits_bytes(model: ModelShape, batch: MicroBatch, b: int) -> int:
    """Bytes of the output layer and the loss: the logits of a chunk, and their gradient, which in
    fp32 takes their place.

    `algos.logprobs` keeps nothing else of this size. Several chunks are computed again one by one.
    """
    copies = 1 if b == 4 else 2
    return copies * b * min(batch.num_labels, batch.loss_chunk_tokens) * model.vocab_size


def backward_buffers(model: ModelShape, batch: MicroBatch, b: int) -> int:
    """Bytes that come and go in the backward pass of a layer: three gradients of the feed-forward
    width, two of the residual stream's, and one of the layer's largest matrix."""
    wide = 3 * model.intermediate_size + 2 * model.hidden_size
    return b * (batch.num_tokens * wide + model.hidden_size * model.intermediate_size)


def forward_buffers(model: ModelShape, tokens: int, b: int) -> int:
    """Bytes at the widest place of a pass that keeps nothing: residual stream, norm, and the
    feed-forward layer's two halves with their product."""
    wide = 3 * model.intermediate_size if model.has_gated_mlp else 2 * model.intermediate_size
    return tokens * (b * (2 * model.hidden_size + wide) + 4 * model.hidden_size)


def kv_cache_bytes(model: ModelShape, tokens: int, b: int) -> int:
    """Bytes of keys and values of so many tokens, in all layers."""
    return tokens * model.num_layers * 2 * model.num_kv_heads * model.head_dim * b

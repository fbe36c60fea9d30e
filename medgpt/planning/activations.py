"""What a forward pass leaves for the backward pass, and what runs without one need.

Counted as in Korthikanti et al., 2022 (arXiv 2205.05198), section 4.1: each tensor that an
operation saves, in the operations that transformers' models and medgpt's attention run: no dropout,
no N x N matrix of attention weights. b is the bytes of a number: 2 in bf16, 4 in fp32.
"""

from dataclasses import dataclass

from medgpt.models.model_shapes import Outline


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The largest micro-batch of a worker."""

    tokens: int
    labels: int
    """Positions that the output layer runs on."""
    chunk: int
    """Of these at a time."""
    checkpointing: bool
    """Activations are computed again in the backward pass."""


def saved_by_layer(model: Outline, b: int) -> int:
    """Bytes a token of one layer.

    A decoder has twice a norm: its input in fp32, its result before and after its weights, and a
    number; queries, keys and values; the attention's output by piece, and all together; four times
    the feed-forward width (gate, its activation, up, their product). An encoder normalises after:
    its attention as above, the inputs and outputs of two norms, the feed-forward layer before and
    after its activation.
    """
    heads = model.num_heads * model.head_size
    keys = model.num_kv_heads * model.head_size
    attention = b * (3 * heads + 2 * keys) + 4 * model.num_heads  # and a number for each head
    if model.gated:
        norms = 2 * (model.hidden * (4 + 2 * b) + 4)
        return attention + norms + 4 * b * model.feed_forward
    norms = 4 * (b * model.hidden + 4)
    return attention + norms + 2 * b * model.feed_forward


def saved_outside(model: Outline, b: int) -> int:
    """Bytes a token outside of the layers: a decoder's last norm and its positions' rotation; an
    encoder's embedding norm and what its head has before the output layer."""
    if model.gated:
        return model.hidden * (4 + 2 * b) + 4 + 2 * b * model.head_size + 8
    return b * 5 * model.hidden + 40


def saved(model: Outline, batch: Batch, b: int) -> int:
    """Bytes that a forward pass keeps, the output layer's not counted.

    With checkpointing each layer keeps its input alone, and one is computed again at a time.
    """
    layer = batch.tokens * saved_by_layer(model, b)
    outside = batch.tokens * saved_outside(model, b)
    if batch.checkpointing:
        return model.num_layers * batch.tokens * b * model.hidden + layer + outside
    return model.num_layers * layer + outside


def logits(model: Outline, batch: Batch, b: int) -> int:
    """Bytes of the output layer and the loss: the logits of a chunk, and their gradient, which in
    fp32 takes their place.

    `algos.logprobs` keeps nothing else of this size. Several chunks are computed again one by one.
    """
    copies = 1 if b == 4 else 2
    return copies * b * min(batch.labels, batch.chunk) * model.vocab


def backward_work(model: Outline, batch: Batch, b: int) -> int:
    """Bytes that come and go in the backward pass of a layer: three gradients of the feed-forward
    width, two of the residual stream's, and one of the layer's largest matrix."""
    wide = 3 * model.feed_forward + 2 * model.hidden
    return b * (batch.tokens * wide + model.hidden * model.feed_forward)


def forward_work(model: Outline, tokens: int, b: int) -> int:
    """Bytes at the widest place of a pass that keeps nothing: residual stream, norm, and the
    feed-forward layer's two halves with their product."""
    wide = 3 * model.feed_forward if model.gated else 2 * model.feed_forward
    return tokens * (b * (2 * model.hidden + wide) + 4 * model.hidden)


def cache(model: Outline, tokens: int, b: int) -> int:
    """Bytes of keys and values of so many tokens, in all layers."""
    return tokens * model.num_layers * 2 * model.num_kv_heads * model.head_size * b

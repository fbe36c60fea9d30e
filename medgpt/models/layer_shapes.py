"""Sizes of a model's layers, read off its modules, which all have the same form in every family."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

_IN_A_LAYER = re.compile(r"\.\d+\.")
_ATTENTION = re.compile("attn|attention")
_EXPERT = re.compile(r"\.experts\.")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk")
_DOWN_PROJECTION = re.compile(r"down_proj|w2|output_linear")


class AttentionShape(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int


class FeedForwardShape(NamedTuple):
    width: int
    """Hidden size of the feed-forward layer that a token passes: the mean over the layers, and the
    sum over the experts of a token."""
    is_gated: bool
    """It has three matrices, as in Llama, instead of two, as in BERT."""


def attention_shape(text: PreTrainedConfig) -> AttentionShape | None:
    """Return the heads of a text model; None if its config names none, as a state-space model's."""
    tree = text.to_dict()
    names = text.attribute_map
    heads = tree.get(names.get("num_attention_heads", "num_attention_heads"))
    if heads is None:
        return None
    hidden = tree[names.get("hidden_size", "hidden_size")]
    kv_heads = tree.get("num_key_value_heads") or tree.get("num_kv_heads") or heads
    if tree.get("multi_query") and not tree.get("new_decoder_architecture"):
        kv_heads = 1
    head_dim = tree.get("head_dim") or hidden // heads
    if tree.get("kv_lora_rank"):  # DeepSeek: keys are longer than values; as many of each in cache
        keys = tree["qk_nope_head_dim"] + tree["qk_rope_head_dim"]
        head_dim, kv_heads = (keys + tree["v_head_dim"]) // 2, heads
    return AttentionShape(heads, kv_heads, head_dim)


def expert_shares(model: nn.Module, text: PreTrainedConfig) -> dict[int, float]:
    """Map the id of each expert's parameter to the share of it that one token uses."""
    tree = text.to_dict()
    per_token = next((tree[key] for key in _EXPERTS_PER_TOKEN if tree.get(key)), None)
    if per_token is None:
        return {}
    counts = {
        name.split(".experts.")[0]: 1 + int(name.split(".experts.")[1].split(".")[0])
        for name, _ in model.named_parameters()
        if re.search(r"\.experts\.\d+\.", name)
    }
    shares = {}
    for name, param in model.named_parameters():
        if _EXPERT.search(name):
            number = counts.get(name.split(".experts.")[0], param.shape[0])
            shares[id(param)] = min(1.0, per_token / number)
    return shares


def feed_forward_shape(
    model: nn.Module, hidden: int, num_layers: int, shares: dict[int, float]
) -> FeedForwardShape:
    """Return the feed-forward layers, by the matrices that lead from the residual stream and back.

    Args:
        shares: of experts, from `expert_shares`.
    """
    up = down = 0.0
    for name, matrix in _matrices_outside_attention(model):
        size = shares.get(id(matrix), 1.0) * math.prod(matrix.shape) / hidden
        if hidden not in matrix.shape:
            continue
        if _leads_back(name, matrix, hidden):
            down += size
        else:
            up += size
    return FeedForwardShape(width=round(down / num_layers), is_gated=up > 1.5 * down)


def _matrices_outside_attention(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if _ATTENTION.search(name) or not _IN_A_LAYER.search(f"{name}."):
            continue
        if isinstance(module, nn.Linear):
            yield name, module.weight
        elif isinstance(module, Conv1D):
            yield name, module.weight.T
        else:
            for key, param in module.named_parameters(recurse=False):
                if param.dim() == 3 and name.endswith("experts"):
                    yield f"{name}.{key}", param


def _leads_back(name: str, matrix: Any, hidden: int) -> bool:
    """Return whether the (out, in) or (experts, ...) matrix ends in the residual stream."""
    if matrix.dim() == 3:
        return _DOWN_PROJECTION.search(name.rpartition(".")[2]) is not None
    return matrix.shape[0] == hidden and (
        matrix.shape[1] != hidden or _DOWN_PROJECTION.search(name) is not None
    )

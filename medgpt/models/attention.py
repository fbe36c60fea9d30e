"""Attention over packed sequences: no sequence attends to another, and no N x N mask is built.

Importing this module registers the function with transformers as "varlen". It takes the arguments
of FlashAttention's variable-length kernels, so one call serves both. transformers never writes the
name of an attention implementation to disk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from medgpt.config.base import ConfigError

VARLEN = "varlen"


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return (1, N, heads, head_dim): each sequence attends to itself, causally if `module` does.

    Args:
        query: (1, heads, N, head_dim); key and value: (1, kv_heads, N, head_dim)
        cu_seq_lens_q: (S + 1,) int32, sequence s is [cu_seq_lens_q[s], cu_seq_lens_q[s + 1])
        sliding_window: number of tokens that each token attends to, itself included; None: all.

    Raises:
        ConfigError: the model's attention has a term that torch's kernels do not support.
        ValueError: cu_seq_lens_q is None. Padded batches and generation need another attention.
    """
    if cu_seq_lens_q is None:
        raise ValueError("varlen attention is for packed batches; set_attn_implementation('sdpa')")
    for term in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(term) is not None:
            raise ConfigError(
                f"model.attention=varlen: {type(module).__name__} needs {term}, which it does not "
                "support; use flash_attention_2 on a GPU or another model"
            )
    assert attention_mask is None, "cu_seq_lens_q gives the sequences"
    causal = bool(module.is_causal if is_causal is None else is_causal)
    lengths = cu_seq_lens_q.diff().tolist()
    # split, not slices: the backward of S slices would allocate S tensors of the full size
    sequences = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    outputs = [
        F.scaled_dot_product_attention(
            q,
            k,
            v,
            scale=scaling,
            dropout_p=dropout,
            enable_gqa=q.shape[1] != k.shape[1],
            **_mask_arguments(q, causal, sliding_window),
        ).transpose(1, 2)
        for q, k, v in sequences
    ]
    return torch.cat(outputs, dim=1), None


def _mask_arguments(query: Tensor, causal: bool, window: int | None) -> dict[str, Any]:
    """Return the mask arguments of scaled_dot_product_attention for one sequence."""
    length = query.shape[2]
    if window is None or length <= window:
        return {"is_causal": causal}
    ones = torch.ones(length, length, dtype=torch.bool, device=query.device)
    in_window = ones.triu(1 - window)
    return {"attn_mask": in_window.tril() if causal else in_window.tril(window - 1)}


# transformers builds no mask for an attention that has no mask function of the same name.
AttentionInterface.register(VARLEN, varlen_attention)

"""Packed attention equals that of each sequence alone, and saved models do not mention it."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medgpt.config.base import ConfigError
from medgpt.models.attention import varlen_attention
from tests.models.tiny_models import KINDS, random_batch, tiny_model


class Causal(nn.Module):
    is_causal = True


class Full(nn.Module):
    is_causal = False


def attend_with_mask(q, k, v, cu_seqlens, *, causal, window=None):
    """Reference implementation with one N x N mask."""
    n, groups = q.shape[2], q.shape[1] // k.shape[1]
    sequence_of_token = torch.bucketize(torch.arange(n), cu_seqlens[1:], right=True)
    distance = torch.arange(n)[:, None] - torch.arange(n)
    seen = sequence_of_token[:, None] == sequence_of_token
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance.abs() < window
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.4).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("module", [Causal(), Full()], ids=["causal", "full"])
def test_outputs_and_gradients_equal_those_of_the_full_mask(module, kv_heads, window):
    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, 5, 6, 17, 22], dtype=torch.int32)
    q, k, v = (torch.randn(1, h, 22, 8, requires_grad=True) for h in (4, kv_heads, kv_heads))
    weights = torch.randn(1, 22, 4, 8)

    out, _ = varlen_attention(
        module, q, k, v, None, cu_seq_lens_q=cu_seqlens, scaling=0.4, sliding_window=window
    )
    want = attend_with_mask(q, k, v, cu_seqlens, causal=module.is_causal, window=window)

    torch.testing.assert_close(out, want)
    for got, expected in zip(
        torch.autograd.grad((out * weights).sum(), (q, k, v)),
        torch.autograd.grad((want * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_packed_logits_equal_those_of_each_sequence_alone(kind):
    model, batch = tiny_model(kind).eval(), random_batch([5, 1, 20, 9])
    bounds = batch.cu_seqlens

    packed = model(
        batch.input_ids,
        position_ids=batch.position_ids,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=20,
        max_length_k=20,
    ).logits[0]
    model.set_attn_implementation("sdpa")
    alone = [model(piece[None]).logits[0] for piece in batch.input_ids[0].split([5, 1, 20, 9])]

    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-4, rtol=0)
    whole = model(batch.input_ids, position_ids=batch.position_ids.clone().fill_(0)).logits[0]
    assert (whole - packed).abs().max() > 0.1  # without cu_seqlens attention does leak


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_sequence_lengths_is_refused(kind):
    with pytest.raises(ValueError, match="packed batches"):
        tiny_model(kind)(torch.ones(2, 3, dtype=torch.int64), attention_mask=torch.ones(2, 3))


def test_a_term_that_the_kernel_does_not_support_is_refused():
    x = torch.randn(1, 1, 2, 8)

    with pytest.raises(ConfigError, match="softcap"):
        varlen_attention(Causal(), x, x, x, None, cu_seq_lens_q=torch.tensor([0, 2]), softcap=30.0)


def test_saved_models_load_where_medgpt_is_not_installed(tmp_path):
    tiny_model("qwen2").save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['medgpt'] = None; import torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "ids = torch.tensor([[0, 5, 6], [3, 4, 5]])\n"
        "model.generate(ids, attention_mask=(ids > 0).long(), max_new_tokens=2)\n"
    )

    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=60)
    assert "varlen" not in "".join(path.read_text() for path in tmp_path.glob("*.json"))

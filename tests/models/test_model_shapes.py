"""The shape computed from a model's config equals that of the model."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from medgpt.config.base import ConfigError
from medgpt.config.model import LoraConfig, ModelConfig
from medgpt.models.lora import apply_lora
from medgpt.models.model_shapes import model_shape
from medgpt.models.value_model import build_value_model
from tests.models.families import FAMILIES
from tests.models.published_configs import PUBLISHED
from tests.models.tiny_models import (
    KINDS,
    VOCAB,
    save_model_with_tokenizer,
    tiny_config,
    tiny_model,
)

IN_CI = ("qwen3-moe", "deepseek-v3", "phi-3", "gpt-2", "bloom", "roberta")
MIXTURES = ("qwen3-moe", "glm-4-moe", "deepseek-v2", "deepseek-v3", "gpt-oss")
QWEN_7B = {  # of Qwen2.5-7B
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


@pytest.fixture
def large(tmp_path: Path) -> str:
    """Return a folder with a config and no weights."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B), "utf-8")
    return str(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model(kind: str, tied: bool) -> None:
    config = tiny_config(kind, tie_embeddings=tied)
    found = model_shape(config, "mlm" if kind == "bert" else "clm", vocab_size=VOCAB)
    model = tiny_model(kind, tie_embeddings=tied)
    assert [weight.num_elements for weight in found.weights] == [
        p.numel() for p in model.parameters()
    ]
    assert found.num_trainable == found.num_params
    assert found.has_gated_mlp == (kind != "bert")
    assert (found.has_tied_embeddings, found.vocab_size, found.num_embedding) == (
        tied,
        VOCAB,
        VOCAB * 32,
    )


def test_a_shape_from_the_config_alone_has_the_published_size(large) -> None:
    found = model_shape(ModelConfig(name=large), "clm")
    assert found.num_params == 7_615_616_512
    assert (found.num_layers, found.num_kv_heads, found.head_dim) == (28, 4, 128)
    # all but the input embedding, the norms and the biases of queries, keys and values
    assert (
        found.num_matmul_params
        == found.num_params - found.num_embedding - 28 * (2 * 3584 + 4608) - 3584
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_sizes(name: str, tmp_path: Path) -> None:
    config, num_params, active_billions = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    found = model_shape(ModelConfig(name=str(tmp_path)), "clm")
    assert found.num_params == num_params
    if active_billions is None:
        assert found.num_active == num_params
    else:
        assert found.num_active / 1e9 == pytest.approx(active_billions, rel=0.02)
        assert found.num_matmul_params < found.num_active
    text = config.get("text_config", config)
    families_without_gate = {"gpt2", "bloom", "opt", "falcon"}
    assert found.has_gated_mlp == (config["model_type"] not in families_without_gate)
    hidden = text.get("hidden_size") or text["n_embd"]
    wide = {  # a token passes 8 experts, and in DeepSeek a shared one or a dense layer as wide
        "qwen3_moe": 8 * 768,
        "deepseek_v3": 9 * 2048,
        "mixtral": 2 * 14336,
    }.get(config["model_type"], text.get("intermediate_size") or text.get("ffn_dim") or 4 * hidden)
    assert found.intermediate_size == wide


def test_a_step_of_many_tokens_reads_all_experts_and_one_of_a_token_those_it_passes(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Qwen3-30B-A3B"].config), "utf-8")
    found = model_shape(ModelConfig(name=str(tmp_path)), "clm")
    assert found.num_used_by(1) == found.num_active
    assert found.num_active < found.num_used_by(4) < 4 * found.num_active
    assert found.num_used_by(500) == pytest.approx(found.num_params, rel=1e-6)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in IN_CI else pytest.mark.slow) for n in FAMILIES]
)
def test_families_have_the_parameters_and_heads_of_their_models(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    folder = family.save(tmp_path / "model")
    config = ModelConfig(name=str(folder), trust_remote_code=family.remote_code)
    found = model_shape(config, "mlm" if family.masked else "clm")
    auto = AutoModelForMaskedLM if family.masked else AutoModelForCausalLM
    model: Any = auto.from_pretrained(folder, trust_remote_code=family.remote_code)
    assert found.num_params == sum(p.numel() for p in model.parameters())
    assert (found.num_heads, found.num_layers) == (4, model.config.num_hidden_layers)
    assert found.has_tied_embeddings == (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    ungated = {"gpt-2", "bloom", "falcon", "opt", "biogpt"}
    assert found.has_gated_mlp == (name not in ungated and not family.masked)
    assert (found.num_active < found.num_params) == (name in MIXTURES)


def test_quantized_weights_take_half_a_byte(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B), "utf-8")
    plain, quantized = (
        model_shape(ModelConfig(name=str(tmp_path), lora=LoraConfig(rank=16, quantize=kind)), "clm")
        for kind in (None, "nf4")
    )
    assert plain.weight_bytes(2) == 2 * plain.num_params
    linear = 7_615_616_512 - 2 * 152064 * 3584 - 28 * (2 * 3584 + 4608) - 3584
    saved = plain.weight_bytes(2) - quantized.weight_bytes(2)
    assert saved == pytest.approx((2 - 0.516) * linear)


def test_a_model_without_attention_is_refused(tmp_path: Path) -> None:
    tree = {"model_type": "mamba", "architectures": ["MambaForCausalLM"], "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(tree | {"num_hidden_layers": 2}), "utf-8")
    with pytest.raises(ConfigError, match="a mamba has no attention heads; name an available"):
        model_shape(ModelConfig(name=str(tmp_path)), "clm")


def test_new_tokens_grow_both_embeddings(large) -> None:
    plain, more = (model_shape(ModelConfig(name=large), "clm", new_tokens=n) for n in (0, 100))
    assert more.num_params - plain.num_params == 2 * 100 * 3584


def test_with_lora_only_the_adapters_are_trainable() -> None:
    lora = LoraConfig(rank=4)
    found = model_shape(tiny_config().model_copy(update={"lora": lora}), "clm", vocab_size=VOCAB)
    adapted = apply_lora(tiny_model(), lora)
    assert found.num_trainable == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert found.num_frozen == sum(p.numel() for p in tiny_model().parameters())


def test_a_value_model_has_a_head_of_one_output(tmp_path: Path) -> None:
    save_model_with_tokenizer(tmp_path, ["高血压是常见的慢性病。"] * 20)
    config = ModelConfig(name=str(tmp_path))
    model = build_value_model(config, seed=0, dtype=tiny_model().dtype)
    found = model_shape(config, "value")
    assert found.num_params == sum(p.numel() for p in model.parameters())
    assert (found.vocab_size, found.has_tied_embeddings) == (1, False)


def test_the_error_for_a_missing_model_names_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.name=.*nowhere: no such folder; .*Qwen2.5-7B"):
        model_shape(ModelConfig(name=str(tmp_path / "nowhere")), "clm")
    (tmp_path / "config.json").write_text("{}", "utf-8")
    with pytest.raises(
        ConfigError, match=r"the model's config cannot be read \(.*\); name an available"
    ):
        model_shape(ModelConfig(name=str(tmp_path)), "clm")

"""The shape computed from a model's config equals that of the model."""

import json
from pathlib import Path

import pytest

from medgpt.config.base import ConfigError
from medgpt.config.model import LoraConfig, ModelConfig
from medgpt.models.lora import apply_lora
from medgpt.models.model_shapes import model_shape
from medgpt.models.value_model import build_value_model
from tests.models.tiny_models import (
    KINDS,
    VOCAB,
    save_model_with_tokenizer,
    tiny_config,
    tiny_model,
)

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

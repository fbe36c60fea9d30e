"""LoRA on models with experts: what it reaches, and what is saved and merged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from medgpt.config.base import ConfigError
from medgpt.config.model import LoraConfig, TokenizerConfig
from medgpt.models.lora import apply_lora, merged_weights
from medgpt.models.tokenizer import train_tokenizer
from medgpt.stages.merge import merge_adapter
from tests.models.moe_models import CONFIGS, moe_model, save_moe_model

IDS = torch.arange(5, 17)[None]
CONFIG = LoraConfig(rank=2, alpha=8)
TEXTS = ["病人咳嗽三天。The patient has a fever."] * 4


def adapted_layers(model: Any) -> set[str]:
    """Return the adapted layers without their number: kind of module and name."""
    names = (name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name)
    return {".".join(name.replace(".base_layer", "").split(".")[-2:]) for name in names}


def randomize(model: Any) -> Any:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def file_names(folder: Path) -> set[str]:
    names = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names.update(tensors.keys())
    return names


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_adapters_reach_dense_layers_and_shared_and_routed_experts(kind: str) -> None:
    layers = adapted_layers(apply_lora(moe_model(kind), CONFIG))
    projections = ("gate_proj", "up_proj", "down_proj")
    assert {f"mlp.{name}" for name in projections} <= layers
    assert {f"shared_experts.{name}" for name in projections} <= layers
    assert {"mlp.experts", "self_attn.o_proj"} <= layers
    assert "mlp.gate" not in layers  # the router


def test_targets_choose_among_experts_and_layers() -> None:
    def layers(*targets: str) -> set[str]:
        return adapted_layers(
            apply_lora(moe_model("deepseek_v3"), LoraConfig(targets=targets, rank=2))
        )

    assert layers("o_proj") == {"self_attn.o_proj"}
    assert layers("gate_up_proj") == {"mlp.experts"}
    assert layers("gate_proj") == {"mlp.gate_proj", "shared_experts.gate_proj"}


def test_dropout_on_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.lora\.dropout=0\.1 cannot reach the experts"):
        apply_lora(moe_model("mixtral"), LoraConfig(rank=2, dropout=0.1))
    apply_lora(moe_model("mixtral"), LoraConfig(rank=2, dropout=0.1, targets=("q_proj",)))


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_merged_model_has_the_logits_of_the_adapter_and_the_names_of_the_hub(
    tmp_path: Path, kind: str
) -> None:
    tokenizer = train_tokenizer(iter(TEXTS), TokenizerConfig(vocab_size=300), "bpe")
    save_moe_model(kind, tmp_path / "base", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "base")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = randomize(apply_lora(model, CONFIG))
    expected = logits(adapted)
    merged_now = {part.name: part.compute() for part in merged_weights(adapted)}
    adapted.save_pretrained(str(tmp_path / "adapter"))
    tokenizer.save_pretrained(tmp_path / "adapter")

    merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
    assert file_names(tmp_path / "merged") == file_names(tmp_path / "base")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged.eval()), expected, rtol=0, atol=1e-5)
    assert merged_now.keys() == merged.state_dict().keys()
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(merged_now[name], weight, rtol=0, atol=1e-6)


def test_merging_into_a_base_in_the_layout_of_modules_writes_the_hubs(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(iter(TEXTS), TokenizerConfig(vocab_size=300), "bpe")
    model = moe_model("qwen3_moe", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "hub")
    model.save_pretrained(tmp_path / "base", save_original_format=False)
    assert file_names(tmp_path / "base") != file_names(tmp_path / "hub")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    apply_lora(model, CONFIG).save_pretrained(str(tmp_path / "adapter"))
    for folder in ("base", "adapter"):
        tokenizer.save_pretrained(tmp_path / folder)
    merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
    assert file_names(tmp_path / "merged") == file_names(tmp_path / "hub")

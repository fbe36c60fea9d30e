"""Rotary positions that are scaled by the config."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from medgpt.config.base import ConfigError
from medgpt.config.model import LoraConfig, ModelConfig, RopeScalingConfig
from medgpt.engine.setup import ensure_process_group
from medgpt.models.load import build_model
from medgpt.models.lora import apply_lora
from medgpt.models.model_files import (
    AdapterBase,
    check_max_length,
    load_hf_config,
    saved_max_positions,
)
from medgpt.models.tokenizer import load_tokenizer
from medgpt.stages.merge import merge_adapter
from medgpt.train.export import export_model
from tests.models.families import FAMILIES
from tests.models.tiny_models import save_model_with_tokenizer

TEXTS = ["患者患有糖尿病，血糖控制不佳。", "Hypertension: see a doctor!"] * 20
YARN = RopeScalingConfig(factor=4)
LONG = torch.arange(3, 203)[None]  # the base has 64 positions


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_model_with_tokenizer(tmp_path / "base", TEXTS)
    return tmp_path / "base"


def config(base: Path, **changes: Any) -> ModelConfig:
    return ModelConfig(name=str(base), rope_scaling=YARN, **changes)


def build(model: ModelConfig) -> Any:
    built = build_model(model, head_kind="clm", seed=0, max_length=256)
    built.set_attn_implementation("sdpa")
    return built


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(LONG).logits


def test_the_positions_are_multiplied_and_max_length_follows(base: Path) -> None:
    plain, scaled = ModelConfig(name=str(base)), config(base)
    assert (saved_max_positions(plain), saved_max_positions(scaled)) == (64, 256)
    check_max_length(load_hf_config(scaled, "clm"), 256)
    with pytest.raises(ConfigError, match=r"max_length=257 exceeds the model's 256 positions"):
        check_max_length(load_hf_config(scaled, "clm"), 257)
    with pytest.raises(ConfigError, match=r"max_length=65 exceeds the model's 64 positions"):
        check_max_length(load_hf_config(plain, "clm"), 65)


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_a_full_export_carries_the_scaling_and_plain_transformers_computes_the_same(
    base: Path, tmp_path: Path, kind: str
) -> None:
    scaling = RopeScalingConfig.model_validate({"kind": kind, "factor": 4})
    model = build(ModelConfig(name=str(base), rope_scaling=scaling))
    reference = AutoConfig.from_pretrained(base)
    reference.rope_parameters = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0}
    if kind == "yarn":
        reference.rope_parameters["original_max_position_embeddings"] = 64
    reference.max_position_embeddings = 256
    expected = logits(AutoModelForCausalLM.from_pretrained(base, config=reference))
    torch.testing.assert_close(logits(model), expected)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.1

    ensure_process_group(torch.device("cpu"))
    export_model(model, load_tokenizer(str(base)), tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.config.max_position_embeddings == 256
    assert exported.config.rope_parameters["rope_type"] == kind
    torch.testing.assert_close(logits(exported), expected)


def test_a_merge_of_adapters_carries_the_scaling(base: Path, tmp_path: Path) -> None:
    model_config = config(base, lora=LoraConfig(rank=4))
    model = apply_lora(build(model_config), model_config.lora)
    for param in model.parameters():
        if param.requires_grad:
            param.data += 0.05 * torch.randn_like(param)
    folder = tmp_path / "run" / "model"
    ensure_process_group(torch.device("cpu"))
    export_model(model, load_tokenizer(str(base)), folder)
    AdapterBase.of(model_config, torch.float32).write(folder)
    assert saved_max_positions(ModelConfig(name=str(folder))) == 256
    merge_adapter(str(tmp_path / "run"), tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=0)
    tree = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert tree["max_position_embeddings"] == 256


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gpt-2", "no rotary positions"),
        ("bert", "no rotary positions"),
        ("gemma-3", "several kinds of rotary positions"),
    ],
)
def test_models_whose_positions_cannot_be_scaled_are_refused(
    tmp_path: Path, family: str, message: str
) -> None:
    folder = FAMILIES[family].save(tmp_path / "model")
    with pytest.raises(ConfigError, match=f"{message}; leave out model.rope_scaling"):
        load_hf_config(config(folder), "mlm" if FAMILIES[family].masked else "clm")


def test_positions_are_scaled_once(base: Path, tmp_path: Path) -> None:
    hf_config = load_hf_config(config(base), "clm")
    hf_config.save_pretrained(tmp_path / "scaled")
    with pytest.raises(ConfigError, match=r"already scaled \(yarn, 256 positions\)"):
        load_hf_config(config(tmp_path / "scaled"), "clm")

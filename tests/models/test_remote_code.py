"""A model with Python code of its own loads, trains and is exported in every role."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from medgpt.config.base import ConfigError
from medgpt.config.model import LoraConfig, ModelConfig
from medgpt.config.train import EngineConfig
from medgpt.engine.build import (
    build_policy,
    build_trainable_value_model,
    load_partitioned_reward_model,
)
from medgpt.engine.setup import ensure_process_group
from medgpt.models.generate import load_for_generation
from medgpt.models.load import build_model
from medgpt.models.lora import apply_lora
from medgpt.models.tokenizer import load_tokenizer
from medgpt.models.value_model import RewardModelInfo, load_value_model
from medgpt.stages.merge import merge_adapter
from medgpt.train.export import export_model
from tests.models.remote_models import save_remote_model

CPU = torch.device("cpu")
IDS = torch.arange(5, 17)[None]
TEXTS = ["病人咳嗽三天。The patient has a fever."] * 4
INFO = RewardModelInfo(mean=0.0, std=1.0, normalised_on="chosen", speech={})


def trusted(folder: Path, **changes: Any) -> ModelConfig:
    return ModelConfig(name=str(folder), trust_remote_code=True, **changes)


def engine(stage: int) -> EngineConfig:
    return EngineConfig(zero_stage=stage, precision="fp32")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ensure_process_group(CPU)
    return save_remote_model(tmp_path_factory.mktemp("remote"), TEXTS)


@pytest.mark.parametrize("stage", [0, 3])
def test_an_exported_model_with_remote_code_loads_again(
    tmp_path: Path, base: Path, stage: int
) -> None:
    policy = build_policy(trusted(base), engine(stage), CPU, seed=0, max_batch_tokens=32)
    assert type(policy.pretrained).__name__ == "TinyForCausalLM"
    export_model(policy.model, load_tokenizer(str(base), True), tmp_path)
    assert (tmp_path / "modeling_tiny.py").is_file()
    expected = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)(IDS).logits
    found, _ = load_for_generation(str(tmp_path), CPU, trust_remote_code=True)
    assert torch.equal(found(IDS).logits, expected)
    build_policy(trusted(tmp_path), engine(3), CPU, seed=0, max_batch_tokens=32)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_reward_model_with_remote_code_is_saved_and_loads_in_every_role(
    tmp_path: Path, base: Path, stage: int
) -> None:
    model = build_trainable_value_model(trusted(base), engine(stage), CPU, seed=0)
    export_model(model.model, load_tokenizer(str(base), True), tmp_path)
    INFO.write(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True)
    assert plain.score.weight.shape == (1, 32)
    scorer, _ = load_value_model(str(tmp_path), base=trusted(base))
    torch.testing.assert_close(scorer.pretrained.get_parameter("score.weight"), plain.score.weight)
    load_partitioned_reward_model(trusted(tmp_path), engine(3), CPU)
    with pytest.raises(ConfigError, match="trust_remote_code"):
        load_value_model(str(tmp_path))


@pytest.mark.parametrize("head_kind", ["clm", "value"])
def test_adapters_on_a_model_with_remote_code_merge(
    tmp_path: Path, base: Path, head_kind: Any
) -> None:
    lora = LoraConfig(rank=2, alpha=8)
    if head_kind == "clm":
        model: Any = apply_lora(build_model(trusted(base), head_kind="clm", seed=0), lora)
    else:
        config = trusted(base, lora=lora)
        model = build_trainable_value_model(config, engine(0), CPU, seed=0).model
        (tmp_path / "adapter").mkdir()
        INFO.write(tmp_path / "adapter")
    model.save_pretrained(str(tmp_path / "adapter"))
    load_tokenizer(str(base), True).save_pretrained(tmp_path / "adapter")
    merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged", trust_remote_code=True)
    assert (tmp_path / "merged" / "modeling_tiny.py").is_file()
    if head_kind == "clm":
        load_for_generation(str(tmp_path / "adapter"), CPU, trust_remote_code=True)
        load_for_generation(str(tmp_path / "merged"), CPU, trust_remote_code=True)
        with pytest.raises(ConfigError, match="trust_remote_code"):
            load_for_generation(str(tmp_path / "adapter"), CPU)
    else:
        load_value_model(str(tmp_path / "adapter"), base=trusted(base))
        load_value_model(str(tmp_path / "merged"), base=trusted(base))

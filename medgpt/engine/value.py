"""Build critics and reward models; at ZeRO-3 no rank ever holds the full model."""

from typing import Any

import torch

from medgpt.config.base import ConfigError
from medgpt.config.model import ModelConfig
from medgpt.config.train import EngineConfig
from medgpt.engine.frozen import FrozenEngine
from medgpt.engine.loading import load_safetensors, partitioned_init
from medgpt.engine.setup import compute_dtype
from medgpt.models.load import SpecialTokenIds, build_empty_model
from medgpt.models.lora import apply_lora
from medgpt.models.model_files import VALUE_HEAD, VALUE_HEAD_WEIGHT, weight_files
from medgpt.models.value_model import (
    ValueModel,
    ValueScale,
    build_value_model,
    has_adapters,
    install_value_head,
    load_reward_model_info,
)


def build_trainable_value_model(
    config: ModelConfig,
    engine: EngineConfig,
    device: torch.device,
    *,
    seed: int,
    max_length: int | None = None,
    normalized: bool = True,
) -> ValueModel:
    """Build a value model to train: a fresh head on a language model, or a saved value model.

    Every rank must call it. All parameters train, or with config.lora.rank the adapters and the
    head. Saved adapters are merged first; in this case every rank holds the full model until the
    engine is built, even at ZeRO-3.

    Args:
        config: `name` must be set.
        seed: of a fresh head and of LoRA's initial weights.
        max_length: tokens of the longest sequence.
        normalized: return values relative to the mean and standard deviation saved with the model,
            as a critic does; False returns the head's raw outputs.

    Raises:
        ConfigError: config.name is no such model, or some of its weights are missing.
    """
    assert config.name is not None
    dtype = compute_dtype(engine, device)
    if engine.zero_stage == 3 and not has_adapters(config.name):
        model = _build_partitioned(config, engine, device, seed=seed, max_length=max_length)
    else:
        model = build_value_model(config, seed=seed, dtype=dtype, max_length=max_length)
    if config.lora.rank:
        torch.manual_seed(seed)  # LoRA draws from torch's global generator
        model = apply_lora(model, config.lora, head=VALUE_HEAD)
    scale = ValueScale.load(config.name) if normalized else ValueScale()
    value_model = ValueModel(
        model,
        mean=scale.mean,
        std=scale.std,
        activation_checkpointing=engine.activation_checkpointing,
    )
    return value_model.train().to(device)


def load_partitioned_reward_model(
    name: str, engine: EngineConfig, device: torch.device
) -> FrozenEngine:
    """Load a reward model that `medgpt reward` wrote, for scoring. Every rank must call it.

    Raises:
        ConfigError: `name` is no reward model, its head is missing, or it holds adapters.
    """
    load_reward_model_info(name)  # raises if `name` is no reward model
    if has_adapters(name):
        raise ConfigError(
            f"model.name={name}: zero_stage=3 cannot load adapters; merge them with medgpt merge "
            "and name the result, or set zero_stage=0"
        )
    model = build_trainable_value_model(ModelConfig(name=name), engine, device, seed=0)
    return FrozenEngine(model, engine, device)


def _build_partitioned(
    config: ModelConfig,
    engine: EngineConfig,
    device: torch.device,
    *,
    seed: int,
    max_length: int | None,
) -> Any:
    assert config.name is not None
    with partitioned_init(engine, device):
        model = build_empty_model(
            config,
            head_kind="value",
            vocab_size=0,
            special_ids=SpecialTokenIds(),
            dtype=compute_dtype(engine, device),
            max_length=max_length,
        )
    missing, _ = load_safetensors(model, weight_files(config.name))
    missing = [name for name in missing if name != VALUE_HEAD_WEIGHT]
    if missing:
        raise ConfigError(
            f"model.name={config.name}: {len(missing)} weights are missing, such as {missing[0]}"
        )
    install_value_head(model, config, seed=seed)  # unpartitioned until the engine is built
    return model

"""Value models that train or score, built so that they fit: at ZeRO-3 no rank holds the whole."""

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
    """A language model with a fresh head, or a reward model or critic with its own; with LoRA if
    asked for.

    Every rank calls it. Without LoRA all its parameters are to be trained, else the adapters and
    the head. Adapters that it was saved with are folded in first: also at ZeRO-3 every rank then
    holds the whole of it until the engine is made.

    Args:
        config: `name` must be set.
        seed: of a fresh head and of LoRA's draws.
        max_length: tokens of the longest piece.
        normalised: values are relative to the mean and deviation that were saved with the model,
            as a critic's that starts from it; False leaves the head's own.

    Raises:
        ConfigError: config.name is no such model, or its weights lack some.
    """
    assert config.name is not None
    dtype = compute_dtype(engine, device)
    if engine.zero_stage == 3 and not has_adapters(config.name):
        model = _build_partitioned(config, engine, device, seed=seed, max_length=max_length)
    else:
        model = build_value_model(config, seed=seed, dtype=dtype, max_length=max_length)
    if config.lora.rank:
        torch.manual_seed(seed)  # LoRA's draws come from torch's global generator
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
    """A reward model as `medgpt reward` wrote it, to score with; every rank calls it.

    Raises:
        ConfigError: `name` is no reward model, its head is missing, or it holds adapters.
    """
    load_reward_model_info(name)  # or there is none
    if has_adapters(name):
        raise ConfigError(
            f"model.name={name}: it holds adapters, and zero_stage=3 reads whole models; fold them "
            "in with medgpt merge and name the result, or set 0"
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
            f"model.name={config.name}: {len(missing)} weights missing, as {missing[0]}"
        )
    install_value_head(model, config, seed=seed)  # whole on every rank until the engine is made
    return model

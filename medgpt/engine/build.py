"""Build the policies, critics and reward models of PPO and of reward-model training.

At ZeRO-3 no rank ever holds the full model.
"""

from typing import Any

import torch

from medgpt.config.base import ModelError
from medgpt.config.data import Packing
from medgpt.config.model import ModelConfig
from medgpt.config.train import EngineConfig
from medgpt.engine.engine import FrozenEngine
from medgpt.engine.loading import build_partitioned
from medgpt.models.freeze import freeze_weights
from medgpt.models.load import build_model, compute_dtype
from medgpt.models.lora import apply_lora
from medgpt.models.model_files import VALUE_HEAD, has_adapters
from medgpt.models.policy import Policy
from medgpt.models.value_model import (
    ValueModel,
    ValueScale,
    build_value_model,
    install_value_head,
    load_reward_model_info,
)


def build_policy(
    config: ModelConfig,
    engine: EngineConfig,
    device: torch.device,
    *,
    seed: int,
    max_batch_tokens: int,
    packing: Packing = "auto",
) -> Policy:
    """Build the policy `config.name` to train, with adapters if config.lora.rank is set.

    Every rank must call it; at ZeRO-3 no rank ever holds the full model.

    Args:
        seed: of the adapters' initial weights.
        max_batch_tokens: tokens of the largest forward pass.

    Raises ConfigError if config.name is no causal model or lacks weights.
    """
    if engine.zero_stage == 3:
        model: Any = build_partitioned(config, engine, device, head_kind="clm", packing=packing)
    else:
        dtype = compute_dtype(engine.precision, device.type)
        model = build_model(config, head_kind="clm", seed=seed, dtype=dtype, packing=packing)
    if config.lora.rank:
        torch.manual_seed(seed)  # LoRA draws from torch's global generator
        model = apply_lora(model, config.lora)
    freeze_weights(model, config.freeze)
    policy = Policy(
        model,
        loss_chunk_tokens=engine.loss_chunk_tokens,
        max_batch_tokens=max_batch_tokens,
        activation_checkpointing=engine.activation_checkpointing,
    )
    return policy.to(device)


def build_trainable_value_model(
    config: ModelConfig,
    engine: EngineConfig,
    device: torch.device,
    *,
    seed: int,
    max_length: int | None = None,
    normalized: bool = True,
    packing: Packing = "auto",
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

    Raises ConfigError if config.name is no such model or lacks weights.
    """
    assert config.name is not None
    if engine.zero_stage == 3 and not has_adapters(config.name):
        model: Any = build_partitioned(
            config, engine, device, head_kind="value", max_length=max_length, packing=packing
        )
        install_value_head(model, config, seed=seed)  # unpartitioned until the engine is built
    else:
        dtype = compute_dtype(engine.precision, device.type)
        model = build_value_model(
            config, seed=seed, dtype=dtype, max_length=max_length, packing=packing
        )
    if config.lora.rank:
        torch.manual_seed(seed)  # LoRA draws from torch's global generator
        model = apply_lora(model, config.lora, head=VALUE_HEAD)
    freeze_weights(model, config.freeze)
    scale = ValueScale.load(config.name) if normalized else ValueScale()
    value_model = ValueModel(
        model,
        mean=scale.mean,
        std=scale.std,
        activation_checkpointing=engine.activation_checkpointing,
    )
    return value_model.train().to(device)


def load_partitioned_reward_model(
    config: ModelConfig,
    engine: EngineConfig,
    device: torch.device,
    *,
    packing: Packing = "auto",
) -> FrozenEngine:
    """Load a reward model that `medgpt reward` wrote, for scoring. Every rank must call it.

    Raises ConfigError if config.name is no reward model, its head is missing, or it holds adapters.
    """
    assert config.name is not None
    load_reward_model_info(config)  # raises if it is no reward model
    if has_adapters(config.name):
        raise ModelError(
            config.name,
            "zero_stage=3 cannot load adapters; merge them with medgpt merge "
            "and name the result, or set zero_stage=0",
        )
    model = build_trainable_value_model(config, engine, device, seed=0, packing=packing)
    return FrozenEngine(model, engine, device)

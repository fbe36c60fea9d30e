"""Build the policy that PPO trains; at ZeRO-3 no rank ever holds the full model."""

from typing import Any

import torch

from medgpt.config.base import ConfigError
from medgpt.config.model import ModelConfig
from medgpt.config.train import EngineConfig
from medgpt.engine.loading import load_safetensors, partitioned_init
from medgpt.engine.setup import compute_dtype
from medgpt.models.load import SpecialTokenIds, build_empty_model, build_model, weight_files
from medgpt.models.lora import apply_lora
from medgpt.models.policy import Policy


def build_policy(
    config: ModelConfig,
    engine: EngineConfig,
    device: torch.device,
    *,
    seed: int,
    max_batch_tokens: int,
) -> Policy:
    """Build the policy `config.name` to train, with adapters if config.lora.rank is set.

    Every rank must call it; at ZeRO-3 no rank ever holds the full model.

    Args:
        seed: of the adapters' initial weights.
        max_batch_tokens: tokens of the largest forward pass.

    Raises:
        ConfigError: config.name is no causal model, or some of its weights are missing.
    """
    options: dict[str, Any] = {
        "head_kind": "clm",
        "vocab_size": 0,  # a saved model's own
        "special_ids": SpecialTokenIds(),
        "dtype": compute_dtype(engine, device),
    }
    if engine.zero_stage == 3:
        assert config.name is not None
        with partitioned_init(engine, device):
            model: Any = build_empty_model(config, **options)
        missing, _ = load_safetensors(model, weight_files(config.name))
        if missing:
            raise ConfigError(
                f"model.name={config.name}: {len(missing)} weights are missing, "
                f"such as {missing[0]}"
            )
    else:
        model = build_model(config, seed=seed, **options)
    if config.lora.rank:
        torch.manual_seed(seed)  # LoRA draws from torch's global generator
        model = apply_lora(model, config.lora)
    policy = Policy(
        model,
        loss_chunk_tokens=engine.loss_chunk_tokens,
        max_batch_tokens=max_batch_tokens,
        activation_checkpointing=engine.activation_checkpointing,
    )
    return policy.to(device)

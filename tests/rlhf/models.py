"""Saved models for the tests of rlhf/."""

from pathlib import Path

import torch

from medgpt.config import EngineConfig, LoraConfig, ModelConfig
from medgpt.engine.value import trainable_value_model
from medgpt.models.tokenizer import load_base
from medgpt.models.value_model import Score


def saved_reward_model(base: Path, folder: Path, *, lora: bool = False, seed: int = 3) -> Path:
    """As `medgpt reward` writes one, from the base model; adapters are not at zero."""
    adapters = LoraConfig(rank=2 if lora else 0)
    config = ModelConfig(name=str(base), lora=adapters)
    engine = EngineConfig(zero_stage=0)
    model = trainable_value_model(config, engine, torch.device("cpu"), seed=seed).model
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    load_base(str(base)).save_pretrained(folder)
    Score(mean=0.5, std=2.0, normalised_on="chosen", speech={}).write(folder)
    return folder

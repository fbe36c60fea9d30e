"""A small PPO run on Ray that several files check, and its inputs."""

import json
from pathlib import Path

import pytest
import torch

from medgpt.config.model import ModelConfig
from medgpt.models.tokenizer import load_tokenizer
from medgpt.models.value_model import RewardModelInfo, ValueModel, build_value_model
from medgpt.runs import Run
from medgpt.stages.ppo import run_ppo
from tests.rlhf.stages import PPOInputs, write_config


@pytest.fixture(scope="session")
def ppo_inputs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> PPOInputs:
    """Fresh models and 18 prompts."""
    folder = tmp_path_factory.mktemp("parts")
    model = build_value_model(ModelConfig(name=str(base)), seed=3, dtype=torch.float32)
    ValueModel(model).pretrained.save_pretrained(folder / "reward")
    load_tokenizer(str(base)).save_pretrained(folder / "reward")
    RewardModelInfo(mean=0.0, std=1.0, normalised_on="nothing", speech={}).write(folder / "reward")
    rows = [json.dumps({"prompt": f"第{day}天头痛,怎么办?"}) + "\n" for day in range(18)]
    (folder / "prompts.jsonl").write_text("".join(rows), "utf-8")
    return PPOInputs(base, folder / "reward", folder / "prompts.jsonl")


@pytest.fixture(scope="session")
def quiet_run(
    ray_session: None, ppo_inputs: PPOInputs, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """Six iterations, two passes over the prompts, one pool per role; never interrupted."""
    return run_ppo(write_config(tmp_path_factory.mktemp("quiet"), ppo_inputs))

"""Small PPO runs on Ray for the tests of this folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from medgpt.config.loading import load
from medgpt.config.ppo import PPOStageConfig

WORKERS = {"actor": 2, "critic": 1, "reward": 1, "reference": 1, "rollout": 2}
LEARN = {"learning_rate": 1e-3}


@dataclass(frozen=True)
class PPOInputs:
    """Models and data of a PPO run."""

    base: Path
    reward: Path
    prompts: Path


def write_config(
    folder: Path, inputs: PPOInputs, *overrides: str, workers: dict[str, int] = WORKERS
) -> PPOStageConfig:
    """Write FOLDER/ppo.toml and return its config, with run directory FOLDER/run. It uses every
    pool and everything that a checkpoint holds."""
    pools: dict[str, Any] = {
        role: {"num_workers": num, "cpus_per_worker": 0.25} for role, num in workers.items()
    }
    for role in ("actor", "critic"):
        pools[role]["engine"] = {"zero_stage": 1}
    source = {"name": "s", "paths": [str(inputs.prompts)], "license": "none", "kind": "prompt"}
    tree = {
        "run": {"dir": str(folder / "run"), "seed": 1},
        "model": {"name": str(inputs.base)},
        "data": {"max_length": 64, "validation_share": 0.0, "sources": [source]},
        "ppo": {
            "prompt_epochs": 2,
            "rollout_batch_size": 8,
            "global_batch_size": 4,
            "epochs": 2,
            "micro_batch_tokens": 128,
            "checkpoint_every": 2,
            "audit": True,
            "kl_controller": "adaptive",
            "kl_target": 1e-3,
            "kl_horizon": 100,
            "normalize_scores": True,
        },
        "reward": {
            "model": str(inputs.reward),
            "functions": [{"name": "letters", "path": "tests.rlhf.test_ppo:letters"}],
        },
        "rollout": {"max_new_tokens": 12},
        "judge": {
            "every": 3,
            "model": str(inputs.reward),
            "triage": 4,
            "languages": ["zh"],
            "max_new_tokens": 4,
        },
        "optimizer": LEARN,
        "critic": {"optimizer": LEARN},
        "pools": pools,
    }
    path = folder / "ppo.toml"
    path.write_text(tomli_w.dumps(tree), "utf-8")
    config = load(PPOStageConfig, path, overrides)
    path.write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)), "utf-8")
    return config

"""Configs of the small stages that tests run."""

from pathlib import Path
from typing import Any

import tomli_w

from medgpt.config.loading import validate
from medgpt.config.stages import PretrainConfig, SFTConfig, TrainStageConfig

TINY_ARCHITECTURE = {
    "kind": "qwen2",
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "intermediate_size": 64,
    "max_positions": 512,
}


def pretrain_settings(run_dir: Path, corpus: Path) -> dict[str, Any]:
    """Return a config of two workers, ZeRO-2, with audit; about 40 steps."""
    return {
        "run": {"dir": str(run_dir), "seed": 1},
        "model": {"architecture": dict(TINY_ARCHITECTURE)},
        "tokenizer": {"mode": "train", "vocab_size": 800},
        "data": {
            "sources": [source_settings("pretrain", corpus / "pretrain")],
            "max_length": 64,
            "validation_share": 0.05,
        },
        "train": {
            "epochs": 2,
            "global_batch_size": 16,
            "micro_batch_size": 4,
            "eval_every": 10,
            "checkpoint_every": 10,
            "audit": True,
        },
        "optimizer": {"learning_rate": 5e-3},
        "engine": {"zero_stage": 2},
        "cluster": {"num_workers": 2},
    }


def write_toml(config: TrainStageConfig, path: Path) -> Path:
    path.write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)), "utf-8")
    return path


def source_settings(name: str, path: Path) -> dict[str, Any]:
    return {"name": name, "paths": [str(path)], "license": "Apache-2.0"}


def pretrain_config(run_dir: Path, corpus: Path, **sections: dict[str, Any]) -> PretrainConfig:
    """Return `pretrain_settings` with changed keys of some sections."""
    return validate(PretrainConfig, _with_sections(pretrain_settings(run_dir, corpus), sections))


def sft_config(run_dir: Path, corpus: Path, base: Path, **sections: dict[str, Any]) -> SFTConfig:
    """Return a config like `pretrain_config` on conversations, from a base model."""
    settings = pretrain_settings(run_dir, corpus)
    settings["model"] = {"name": str(base)}
    settings["tokenizer"] = {}
    settings["data"] |= {"sources": [source_settings("sft", corpus / "sft")], "max_length": 256}
    settings["engine"] = {"zero_stage": 1}
    return validate(SFTConfig, _with_sections(settings, sections))


def _with_sections(settings: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    for name, section in sections.items():
        settings[name] = {**settings.get(name, {}), **section}
    return settings

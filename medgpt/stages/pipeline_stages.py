"""The stages of a pipeline, loaded and validated without heavy libraries."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medgpt.config.base import ConfigError, did_you_mean
from medgpt.config.dpo import DPOConfig
from medgpt.config.evaluation import EvalConfig
from medgpt.config.gates import REWARD_TASK, parse_gate
from medgpt.config.loading import load
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.reward_model import RewardModelConfig
from medgpt.config.stages import (
    CorpusConfig,
    PipelineConfig,
    PipelineStage,
    PretrainConfig,
    SFTConfig,
    TrainStageConfig,
)
from medgpt.runs import Run

STAGE_CONFIGS = {
    "corpus": CorpusConfig,
    "pretrain": PretrainConfig,
    "sft": SFTConfig,
    "reward": RewardModelConfig,
    "dpo": DPOConfig,
    "ppo": PPOStageConfig,
    "eval": EvalConfig,
}
PipelineStageConfig = CorpusConfig | TrainStageConfig | PPOStageConfig | EvalConfig


@dataclass(frozen=True)
class LoadedStage:
    """A stage with its config; `name` defaults to its kind, with a number from the second on."""

    name: str
    kind: str
    config: PipelineStageConfig
    gates: tuple[str, ...] = ()  # of a reward stage; those of an evaluation are in its config

    @property
    def run(self) -> Run:
        return Run(self.config.run.dir)


def load_stages(config: PipelineConfig) -> list[LoadedStage]:
    """Load the configs of all stages.

    Raises:
        ConfigError: a config is invalid, two stages share a name or a run directory, or gates name
            an unknown stage.
    """
    stages: list[LoadedStage] = []
    for item in config.stages:
        number = 1 + sum(stage.kind == item.stage for stage in stages)
        name = item.name or (item.stage if number == 1 else f"{item.stage}-{number}")
        if any(stage.name == name for stage in stages):
            raise ConfigError(f"two stages are called {name}; set a different name for one of them")
        gates = config.gates.get(name, ()) if item.stage == "reward" else ()
        _validate_reward_gates(name, gates)
        stages.append(LoadedStage(name, item.stage, _load_stage_config(config, item, name), gates))
    gate_stage_names = [stage.name for stage in stages if stage.kind in ("eval", "reward")]
    for name in config.gates:
        if name not in gate_stage_names:
            hint = did_you_mean(name, gate_stage_names)
            raise ConfigError(f"gates.{name}: no eval or reward stage has this name; {hint}")
    run_dir_owners = {config.run.dir: "the pipeline"}
    for stage in stages:
        folder = stage.config.run.dir
        if folder in run_dir_owners:
            raise ConfigError(
                f"stage {stage.name}: run.dir={folder} is also that of "
                f"{run_dir_owners[folder]}; set a different run.dir for each stage"
            )
        run_dir_owners[folder] = f"stage {stage.name}"
    return stages


def stage_overrides(config: PipelineConfig, stage: PipelineStage) -> list[str]:
    """Return the overrides of a stage: those for all stages of its kind, then its own."""
    shared = config.overrides.get(stage.stage, ())
    return [text.replace("{dir}", config.run.dir) for text in (*shared, *stage.overrides)]


def _load_stage_config(
    config: PipelineConfig, stage: PipelineStage, name: str
) -> PipelineStageConfig:
    overrides = stage_overrides(config, stage)
    try:
        stage_config = load(STAGE_CONFIGS[stage.stage], Path(stage.config), overrides)
        if isinstance(stage_config, EvalConfig) and name in config.gates:
            gates = json.dumps([*stage_config.gates, *config.gates[name]], ensure_ascii=False)
            stage_config = load(EvalConfig, Path(stage.config), [*overrides, f"gates={gates}"])
        if isinstance(stage_config, EvalConfig) and stage_config.model.name is None:
            raise ConfigError("model.name is unset; name the run whose model is scored")
    except ConfigError as error:
        raise ConfigError(f"stage {stage.stage}, {stage.config}: {error}") from None
    return stage_config


def _validate_reward_gates(name: str, gates: Sequence[str]) -> None:
    """Raise ConfigError if a gate is invalid or not about the accuracy of a reward model."""
    for text in gates:
        try:
            gate = parse_gate(text)
        except ValueError as error:
            raise ConfigError(f"gates.{name}: {error}") from None
        if gate.name != (REWARD_TASK, "accuracy") or gate.needs_parent:
            raise ConfigError(
                f"gates.{name}: gate {text!r} must be about {REWARD_TASK}.accuracy, the only "
                "score of a reward model, and cannot refer to a parent"
            )

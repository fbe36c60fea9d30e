"""Several stages in one process, on one Ray, and what their models are worth."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from medgpt.config import (
    ConfigError,
    CorpusConfig,
    DPOConfig,
    EvalConfig,
    PipelineConfig,
    PipelineStage,
    PPOStageConfig,
    PretrainConfig,
    RewardConfig,
    SFTConfig,
    load,
)
from medgpt.config.gates import parse_gate
from medgpt.data.sample.write import run_corpus
from medgpt.eval.evaluate import run_eval
from medgpt.eval.gates import Evidence, GateFailure, check_gates, require
from medgpt.eval.pipeline_report import write_pipeline_report
from medgpt.eval.results import GATES, RESULTS, REWARD, read_items, reward_results
from medgpt.eval.stages import run_dpo, run_ppo, run_pretrain, run_reward, run_sft
from medgpt.metrics import ConsoleReporter
from medgpt.runs import Run

CONFIGS = {
    "corpus": CorpusConfig,
    "pretrain": PretrainConfig,
    "sft": SFTConfig,
    "reward": RewardConfig,
    "dpo": DPOConfig,
    "ppo": PPOStageConfig,
    "eval": EvalConfig,
}
QUESTIONS = ("pretrain", "sft", "rlhf")  # kinds of key points whose answers the console shows

StageConfig = (
    CorpusConfig
    | PretrainConfig
    | SFTConfig
    | RewardConfig
    | DPOConfig
    | PPOStageConfig
    | EvalConfig
)


@dataclass(frozen=True)
class Stage:
    """One step of a pipeline. `name` is its kind, numbered from the second of a kind on."""

    name: str
    kind: str
    config: StageConfig
    gates: tuple[str, ...] = ()  # of a reward stage; an evaluation's are in its config

    @property
    def run(self) -> Run:
        return Run(self.config.run.dir)


def run_pipeline(config: PipelineConfig) -> Run:
    """Run all stages and report.

    Raises:
        ConfigError: a stage's config is wrong.
        GateFailure: a model did not reach what it must; later stages did not run.
    """
    stages = read_stages(config)
    pipeline = Run.open(
        "pipeline", config, run_dir=config.run.dir, allow_changes=config.run.allow_changes
    )
    try:
        for stage in stages:
            _run(stage.config)
            if stage.gates:
                require(_check_reward(stage))
    except GateFailure as failure:
        write_pipeline_report(pipeline, {stage.name: stage.run for stage in stages})
        raise GateFailure(f"{failure}; report in {pipeline.folder.url}/report.html") from None
    write_pipeline_report(pipeline, {stage.name: stage.run for stage in stages})
    if not pipeline.finished:
        urls = {stage.name: stage.run.folder.url for stage in stages}
        pipeline.update_manifest(finished=True, runs=urls)
    _show(pipeline, [stage.run for stage in stages if stage.kind == "eval"])
    return pipeline


def read_stages(config: PipelineConfig) -> list[Stage]:
    """The stages with their configs.

    Raises:
        ConfigError: one is wrong, two have the same name or run directory, or gates are for none.
    """
    stages: list[Stage] = []
    for item in config.stages:
        number = 1 + sum(stage.kind == item.stage for stage in stages)
        name = item.name or (item.stage if number == 1 else f"{item.stage}-{number}")
        if any(stage.name == name for stage in stages):
            raise ConfigError(f"two stages are called {name}; give each a name of its own")
        gates = config.gates.get(name, ()) if item.stage == "reward" else ()
        _check_reward_gates(name, gates)
        stages.append(Stage(name, item.stage, _stage_config(config, item, name), gates))
    gated = [stage.name for stage in stages if stage.kind in ("eval", "reward")]
    for name in config.gates:
        if name not in gated:
            close = difflib.get_close_matches(name, gated, n=1)
            hint = (
                f"did you mean {close[0]}?" if close else f"there are {', '.join(gated) or 'none'}"
            )
            raise ConfigError(f"gates.{name}: no eval or reward stage is called that; {hint}")
    taken = {config.run.dir: "the pipeline"}
    for stage in stages:
        folder = stage.config.run.dir
        if folder in taken:
            raise ConfigError(
                f"stage {stage.name}: run.dir={folder} is that of {taken[folder]}, too; give each "
                "stage its own"
            )
        taken[folder] = f"stage {stage.name}"
    return stages


def _stage_config(config: PipelineConfig, stage: PipelineStage, name: str) -> StageConfig:
    shared = config.overrides.get(stage.stage, ())
    overrides = [text.replace("{dir}", config.run.dir) for text in (*shared, *stage.overrides)]
    try:
        found = load(CONFIGS[stage.stage], Path(stage.config), overrides)
        if isinstance(found, EvalConfig) and name in config.gates:
            gates = json.dumps([*found.gates, *config.gates[name]], ensure_ascii=False)
            found = load(EvalConfig, Path(stage.config), [*overrides, f"gates={gates}"])
        if isinstance(found, EvalConfig) and found.model.name is None:
            raise ConfigError("model.name is unset; name the run whose model is scored")
    except ConfigError as error:
        raise ConfigError(f"stage {stage.stage}, {stage.config}: {error}") from None
    return found


def _check_reward_gates(name: str, gates: Sequence[str]) -> None:
    """Raises ConfigError: one is none, or names what a reward model is not measured by."""
    for text in gates:
        try:
            gate = parse_gate(text)
        except ValueError as error:
            raise ConfigError(f"gates.{name}: {error}") from None
        if gate.name != (REWARD, "accuracy") or gate.needs_parent:
            raise ConfigError(
                f"gates.{name}: gate {text!r} is not about {REWARD}.accuracy, all that a reward "
                "model is measured by, or compares it with a parent, which it has not"
            )


def _check_reward(stage: Stage) -> list[Evidence]:
    """What the gates of a reward stage saw, also in its gates.json."""
    evidence = check_gates(stage.gates, reward_results(stage.run), None)
    stage.run.folder.write_json(GATES, [asdict(item) for item in evidence])
    for item in evidence:
        print(f"{stage.name}: gate {'passed' if item.passed else 'FAILED'}: {item}")
    return evidence


def _run(config: StageConfig) -> None:
    match config:
        case CorpusConfig():
            run_corpus(config)
        case PretrainConfig():
            run_pretrain(config)
        case SFTConfig():
            run_sft(config)
        case RewardConfig():
            run_reward(config)
        case DPOConfig():
            run_dpo(config)
        case PPOStageConfig():
            run_ppo(config)
        case EvalConfig():
            run_eval(config)


def _show(pipeline: Run, evaluations: Sequence[Run]) -> None:
    """What the models answered to the questions of their stages, and where the report is."""
    reporter = ConsoleReporter("pipeline")
    for run in evaluations:
        for name, task in run.folder.read_json(RESULTS)["tasks"].items():
            if task["kind"] == "key_points":
                for item in read_items(run, name):
                    if item.slices["kind"] in QUESTIONS and item.shown:
                        reporter.say(f"{item.shown['question']}\n    {item.shown['answer']}")
    reporter.say(f"report in {pipeline.folder.url}/report.html")
    reporter.close()

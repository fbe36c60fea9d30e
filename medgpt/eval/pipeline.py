"""Several stages in one process, on one Ray, and what their models know in the end."""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medgpt.config import (
    ClusterConfig,
    ConfigError,
    CorpusConfig,
    PipelineConfig,
    PipelineStage,
    PretrainConfig,
    SFTConfig,
    load,
)
from medgpt.data.sample.write import run_corpus
from medgpt.eval.questions import Answer, as_json, ask, from_json, summary
from medgpt.eval.report import page
from medgpt.eval.stages import run_pretrain, run_sft
from medgpt.metrics import ConsoleReporter
from medgpt.runs import Run, committed
from medgpt.train import session

ANSWERS = "answers.json"
CONFIGS = {"corpus": CorpusConfig, "pretrain": PretrainConfig, "sft": SFTConfig}
QUESTIONS = ("pretrain", "sft", "rlhf")  # shown on the console
REQUIRED = ("pretrain", "sft")  # questions that the models of these stages must answer

StageConfig = CorpusConfig | PretrainConfig | SFTConfig


@dataclass(frozen=True)
class Stage:
    """One step of a pipeline. `name` is its kind, numbered from the second of a kind on."""

    name: str
    kind: str
    config: StageConfig

    @property
    def run(self) -> Run:
        return Run(self.config.run.dir)

    @property
    def generates(self) -> bool:
        """Whether its model can be asked questions; one of masked pretraining cannot."""
        if isinstance(self.config, PretrainConfig):
            return self.config.objective.kind == "clm"
        return not isinstance(self.config, CorpusConfig)


def run_pipeline(config: PipelineConfig) -> Run:
    """Run all stages, ask the held-out questions if there is a sample corpus, report.

    Raises:
        ConfigError: a stage's config is wrong, or the models do not know what they must.
    """
    stages = read_stages(config)
    pipeline = Run.open(
        "pipeline", config, run_dir=config.run.dir, allow_changes=config.run.allow_changes
    )
    for stage in stages:
        _train(stage.config)
    models = models_to_ask(stages)
    weights = {stage.name: _weights(stage.run) for stage in stages if stage.kind != "corpus"}
    if pipeline.manifest.get("models") != weights:
        answers = _examine(stages, models)
        pipeline.folder.write_json(ANSWERS, as_json(answers))
        write_pipeline_report(pipeline, {stage.name: stage.run for stage in stages}, answers)
        urls = {stage.name: stage.run.folder.url for stage in stages}
        pipeline.update_manifest(finished=True, runs=urls, models=weights)
    answers = from_json(pipeline.folder.read_json(ANSWERS))
    _show(pipeline, answers)
    require_answers(answers, models)
    return pipeline


def read_stages(config: PipelineConfig) -> list[Stage]:
    """The stages with their configs.

    Raises:
        ConfigError: one is wrong, or two have the same run directory.
    """
    stages: list[Stage] = []
    for item in config.stages:
        number = 1 + sum(stage.kind == item.stage for stage in stages)
        name = item.stage if number == 1 else f"{item.stage}-{number}"
        stages.append(Stage(name, item.stage, _stage_config(config, item)))
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


def _stage_config(config: PipelineConfig, stage: PipelineStage) -> StageConfig:
    overrides = [text.replace("{dir}", config.run.dir) for text in stage.overrides]
    try:
        return load(CONFIGS[stage.stage], Path(stage.config), overrides)
    except ConfigError as error:
        raise ConfigError(f"stage {stage.stage}, {stage.config}: {error}") from None


def _train(config: StageConfig) -> None:
    match config:
        case CorpusConfig():
            run_corpus(config)
        case PretrainConfig():
            run_pretrain(config)
        case SFTConfig():
            run_sft(config)


def models_to_ask(stages: Sequence[Stage]) -> dict[str, Run]:
    """Of each kind of stage the last run whose model generates."""
    return {stage.kind: stage.run for stage in stages if stage.generates}


def _weights(run: Run) -> list[dict[str, Any]]:
    """Files of a run's model with checksums."""
    manifest = committed(run.model)
    assert manifest is not None, f"{run.folder.url} finished without a model"
    return manifest["files"]


def _examine(stages: Sequence[Stage], models: dict[str, Run]) -> list[Answer]:
    """What the models say to the questions of the corpus; nothing without a corpus or a model."""
    corpora = [stage.run for stage in stages if stage.kind == "corpus"]
    if not corpora or not models:
        return []
    config = stages[-1].config
    cluster = ClusterConfig() if isinstance(config, CorpusConfig) else config.cluster
    reporter = ConsoleReporter("questions")
    try:
        session.connect(cluster)
        reporter.advance("asking", 0, 1)
        urls = {kind: run.model.url for kind, run in models.items()}
        answers = ask(corpora[-1].data.url, urls, num_cpus=cluster.cpus_per_worker)
        reporter.advance("asking", 1, 1)
    finally:
        reporter.close()
    return answers


def write_pipeline_report(pipeline: Run, runs: dict[str, Run], answers: Sequence[Answer]) -> None:
    """Write report.html: the stages, what their models answered, links to their reports."""
    html = page(
        "pipeline.html.jinja",
        name=pipeline.folder.url.rsplit("/", 1)[-1],
        stages=[_row(pipeline, name, run) for name, run in runs.items() if run.metrics()],
        answers=answers,
        summary=summary(answers),
    )
    pipeline.folder.write_text("report.html", html)


def _row(pipeline: Run, name: str, run: Run) -> dict[str, Any]:
    metrics = run.metrics()
    return {
        "name": name,
        "steps": metrics[-1]["step"],
        "minutes": metrics[-1]["time_s"] / 60,
        "losses": [line["validation/loss"] for line in metrics if "validation/loss" in line],
        "report": f"{run.folder.url}/report.html".removeprefix(f"{pipeline.folder.url}/"),
    }


def _show(pipeline: Run, answers: Sequence[Answer]) -> None:
    """The three questions, counts of the others, and where the report is."""
    reporter = ConsoleReporter("pipeline")
    for answer in answers:
        if answer.kind in QUESTIONS:
            reporter.say(f"{answer.prompt}\n    {answer.text}")
    for kind, counts in summary(answers).items():
        reporter.say(
            f"{kind}: {counts['passed']} of {counts['asked']} answered in full, "
            f"{counts['stated']} of {counts['key_points']} key points"
        )
    reporter.say(f"report in {pipeline.folder.url}/report.html")
    reporter.close()


def require_answers(answers: Sequence[Answer], models: Container[str]) -> None:
    """Raises ConfigError if a stage did not learn its answer, or knows what was left out.

    Args:
        models: kinds of the stages whose models were asked.
    """
    failures = []
    for answer in answers:
        if answer.kind in REQUIRED and answer.kind in models and not answer.passed:
            lacking = ", ".join(answer.missing)
            failures.append(f"{answer.prompt!r} is not answered: the answer lacks {lacking}")
        if answer.kind == "left_out" and answer.passed:
            failures.append(f"{answer.prompt!r} is answered although no training text tells it")
    if failures:
        raise ConfigError("; ".join(failures))

"""Several stages in one process, on one Ray, and what their models know in the end."""

from collections.abc import Sequence
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
Runs = dict[str, Run]


def run_pipeline(config: PipelineConfig) -> Run:
    """Run all stages, ask the held-out questions if there is a sample corpus, report.

    Raises:
        ConfigError: a stage's config is wrong, or the models do not know what they must.
    """
    stages = [(stage.stage, _stage_config(config, stage)) for stage in config.stages]
    pipeline = Run.open(
        "pipeline", config, run_dir=config.run.dir, allow_changes=config.run.allow_changes
    )
    runs: Runs = {name: _run(stage_config) for name, stage_config in stages}
    asked_of = _models(runs)
    if pipeline.manifest.get("asked_of") != asked_of:
        answers = _examine(runs, stages[-1][1])
        pipeline.folder.write_json(ANSWERS, as_json(answers))
        write_pipeline_report(pipeline, runs, answers)
        urls = {name: run.folder.url for name, run in runs.items()}
        pipeline.update_manifest(finished=True, runs=urls, asked_of=asked_of)
    answers = from_json(pipeline.folder.read_json(ANSWERS))
    _show(pipeline, answers)
    require_answers(answers, asked_of)
    return pipeline


def _stage_config(config: PipelineConfig, stage: PipelineStage) -> StageConfig:
    overrides = [text.replace("{dir}", config.run.dir) for text in stage.overrides]
    try:
        return load(CONFIGS[stage.stage], Path(stage.config), overrides)
    except ConfigError as error:
        raise ConfigError(f"stage {stage.stage}, {stage.config}: {error}") from None


def _run(config: StageConfig) -> Run:
    if isinstance(config, CorpusConfig):
        return run_corpus(config)
    return run_pretrain(config) if isinstance(config, PretrainConfig) else run_sft(config)


def _models(runs: Runs) -> dict[str, Any]:
    """The weights of each stage's model: files with checksums."""
    manifests = {name: committed(run.model) for name, run in runs.items()}
    return {name: manifest["files"] for name, manifest in manifests.items() if manifest}


def _examine(runs: Runs, config: StageConfig) -> list[Answer]:
    """What the models say to the questions of the corpus; nothing without a corpus or a model."""
    models = {name: runs[name].model.url for name in _models(runs)}
    if "corpus" not in runs or not models:
        return []
    cluster = ClusterConfig() if isinstance(config, CorpusConfig) else config.cluster
    reporter = ConsoleReporter("questions")
    try:
        session.connect(cluster)
        reporter.advance("asking", 0, 1)
        answers = ask(runs["corpus"].data.url, models, num_cpus=cluster.cpus_per_worker)
        reporter.advance("asking", 1, 1)
    finally:
        reporter.close()
    return answers


def write_pipeline_report(pipeline: Run, runs: Runs, answers: Sequence[Answer]) -> None:
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


def require_answers(answers: Sequence[Answer], models: dict[str, Any]) -> None:
    """Raises ConfigError if a stage did not learn its answer, or knows what was left out."""
    failures = []
    for answer in answers:
        if answer.kind in REQUIRED and answer.kind in models and not answer.passed:
            lacking = ", ".join(answer.missing)
            failures.append(f"{answer.prompt!r} is not answered: the answer lacks {lacking}")
        if answer.kind == "left_out" and answer.passed:
            failures.append(f"{answer.prompt!r} is answered although no training text tells it")
    if failures:
        raise ConfigError("; ".join(failures))

"""Several stages in one process, on one Ray, and what their models know in the end."""

from pathlib import Path

from jinja2 import Environment, PackageLoader

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
from medgpt.eval.questions import Answer, as_json, ask, summary
from medgpt.eval.stages import run_pretrain, run_sft
from medgpt.metrics import ConsoleReporter
from medgpt.runs import Run
from medgpt.train import session

ANSWERS = "answers.json"
CONFIGS = {"corpus": CorpusConfig, "pretrain": PretrainConfig, "sft": SFTConfig}
REQUIRED = ("pretrain", "sft")  # questions that the models of these stages must answer


def run_pipeline(config: PipelineConfig) -> Run:
    """Run all stages, ask the held-out questions if there is a sample corpus, report.

    Raises:
        ConfigError: a stage's config is wrong, or a question of a stage that ran is not answered.
    """
    stages = [(stage.stage, _stage_config(config, stage)) for stage in config.stages]
    pipeline = Run.open(
        "pipeline", config, run_dir=config.run.dir, allow_changes=config.run.allow_changes
    )
    runs: dict[str, Run] = {}
    for name, stage_config in stages:
        runs[name] = _run(stage_config)
    if not pipeline.folder.exists(ANSWERS) and "corpus" in runs:
        _examine(pipeline, runs, stages[-1][1])
    if not pipeline.folder.exists("report.html"):
        _report(pipeline, runs)
    pipeline.update_manifest(finished=True, runs={n: run.folder.url for n, run in runs.items()})
    _show(pipeline, runs)
    return pipeline


def _stage_config(
    config: PipelineConfig, stage: PipelineStage
) -> CorpusConfig | PretrainConfig | SFTConfig:
    overrides = [text.replace("{dir}", config.run.dir) for text in stage.overrides]
    try:
        return load(CONFIGS[stage.stage], Path(stage.config), overrides)
    except ConfigError as error:
        raise ConfigError(f"stage {stage.stage}, {stage.config}: {error}") from None


def _run(config: CorpusConfig | PretrainConfig | SFTConfig) -> Run:
    if isinstance(config, CorpusConfig):
        return run_corpus(config)
    return run_pretrain(config) if isinstance(config, PretrainConfig) else run_sft(config)


def _examine(
    pipeline: Run, runs: dict[str, Run], config: CorpusConfig | PretrainConfig | SFTConfig
) -> None:
    """Ask the models the questions of the corpus."""
    cluster = ClusterConfig() if isinstance(config, CorpusConfig) else config.cluster
    models = {name: run.model.url for name, run in runs.items() if name != "corpus"}
    if not models:
        return
    reporter = ConsoleReporter("questions")
    session.connect(cluster)
    reporter.advance("asking", 0, 1)
    answers = ask(runs["corpus"].data.url, models, num_cpus=cluster.cpus_per_worker)
    reporter.close()
    pipeline.folder.write_json(ANSWERS, as_json(answers))


def _report(pipeline: Run, runs: dict[str, Run]) -> None:
    answers = pipeline.folder.read_json(ANSWERS) if pipeline.folder.exists(ANSWERS) else []
    page = Environment(loader=PackageLoader("medgpt.eval"), autoescape=True).get_template(
        "pipeline.html.jinja"
    )
    html = page.render(
        name=pipeline.folder.url.rsplit("/", 1)[-1],
        runs={name: run for name, run in runs.items() if run.metrics()},
        answers=answers,
        summary=summary([_answer(item) for item in answers]),
    )
    pipeline.folder.write_text("report.html", html)


def _answer(item: dict[str, object]) -> Answer:
    return Answer(**{key: value for key, value in item.items() if key != "passed"})  # type: ignore[arg-type]


def _show(pipeline: Run, runs: dict[str, Run]) -> None:
    """The three questions and where the report is; fails if a stage did not learn its answer."""
    reporter = ConsoleReporter("pipeline")
    reporter.close()
    answers = pipeline.folder.read_json(ANSWERS) if pipeline.folder.exists(ANSWERS) else []
    for item in answers:
        if item["kind"] in ("pretrain", "sft", "rlhf"):
            reporter.say(f"{item['prompt']}\n    {item['text']}")
    for kind, counts in summary([_answer(item) for item in answers]).items():
        reporter.say(
            f"{kind}: {counts['passed']} of {counts['asked']} answered in full, "
            f"{counts['stated']} of {counts['key_points']} key points"
        )
    reporter.say(f"report in {pipeline.folder.url}/report.html")
    missed = [a for a in answers if a["kind"] in REQUIRED and a["kind"] in runs and not a["passed"]]
    if missed:
        raise ConfigError(
            "; ".join(
                f"{item['prompt']!r} is not answered: the answer lacks "
                + ", ".join(
                    points[0]
                    for points, found in zip(item["key_points"], item["stated"], strict=True)
                    if not found
                )
                for item in missed
            )
        )

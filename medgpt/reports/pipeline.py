"""report.html of a pipeline: its stages, gates and scores side by side."""

from collections.abc import Mapping
from typing import Any

from medgpt.eval.results import RESULTS, REWARD_TASK, reward_results
from medgpt.reports.evaluation import load_eval_column, load_gate_results
from medgpt.reports.run import write_page
from medgpt.reports.scores import EvalColumn, build_task_tables, classify_change
from medgpt.runs import Run
from medgpt.train.reward_eval import REWARD_EVAL_FILE


def write_pipeline_report(pipeline: Run, runs: Mapping[str, Run]) -> None:
    """Write report.html: the stages, the gates, and the scores of all evaluations in order."""
    evaluations = {name: run for name, run in runs.items() if run.folder.exists(RESULTS)}
    columns = [
        _reward_model_column(name, run)
        if run.folder.exists(REWARD_EVAL_FILE)
        else load_eval_column(name, run)
        for name, run in runs.items()
        if name in evaluations or run.folder.exists(REWARD_EVAL_FILE)
    ]
    write_page(
        pipeline,
        "pipeline.html.jinja",
        stages=[_stage_row(pipeline, name, run) for name, run in runs.items() if run.metrics()],
        evaluations=[(name, _report_link(pipeline, run)) for name, run in evaluations.items()],
        gate_results=load_gate_results(runs),
        tables=build_task_tables(columns, 0),
    )


def _reward_model_column(name: str, run: Run) -> EvalColumn:
    """Return the column of a reward model, whose only score is its held-out accuracy."""
    return EvalColumn(name, reward_results(run), {REWARD_TASK: []})


def _stage_row(pipeline: Run, name: str, run: Run) -> dict[str, Any]:
    metrics = run.metrics()
    losses = [line["validation/loss"] for line in metrics if "validation/loss" in line]
    change = losses[-1] - losses[0] if losses else 0.0
    return {
        "name": name,
        "steps": metrics[-1]["step"],
        "minutes": metrics[-1]["time_s"] / 60,
        "losses": losses,
        "verdict": classify_change("validation/loss", change),
        "report": _report_link(pipeline, run),
    }


def _report_link(pipeline: Run, run: Run) -> str:
    return f"{run.folder.url}/report.html".removeprefix(f"{pipeline.folder.url}/")

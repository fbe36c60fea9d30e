"""report.html of a pipeline: its stages, gates and scores side by side."""

from collections.abc import Mapping
from typing import Any

from medgpt.eval.results import RESULTS, REWARD, reward_results
from medgpt.reports.evaluation import read_column, read_gates, score_tables
from medgpt.reports.run import page
from medgpt.reports.scores import Column
from medgpt.runs import Run
from medgpt.train.reward_eval import FINDINGS


def write_pipeline_report(pipeline: Run, runs: Mapping[str, Run]) -> None:
    """Write report.html: the stages, the gates, and the scores of all evaluations in order.

    An unchanged report is not written again.
    """
    scored = {name: run for name, run in runs.items() if run.folder.exists(RESULTS)}
    columns = [
        _reward_column(name, run) if run.folder.exists(FINDINGS) else read_column(name, run)
        for name, run in runs.items()
        if name in scored or run.folder.exists(FINDINGS)
    ]
    html = page(
        "pipeline.html.jinja",
        name=pipeline.folder.url.rsplit("/", 1)[-1],
        stages=[_row(pipeline, name, run) for name, run in runs.items() if run.metrics()],
        evaluations=[(name, _link(pipeline, run)) for name, run in scored.items()],
        evidence=read_gates(runs),
        **score_tables(columns, 0),
    )
    folder = pipeline.folder
    if not folder.exists("report.html") or folder.read_text("report.html") != html:
        folder.write_text("report.html", html)


def _reward_column(name: str, run: Run) -> Column:
    """Of a reward model, which answers no task: how it tells held-out answers apart."""
    return Column(name, reward_results(run), {REWARD: []})


def _row(pipeline: Run, name: str, run: Run) -> dict[str, Any]:
    metrics = run.metrics()
    return {
        "name": name,
        "steps": metrics[-1]["step"],
        "minutes": metrics[-1]["time_s"] / 60,
        "losses": [line["validation/loss"] for line in metrics if "validation/loss" in line],
        "report": _link(pipeline, run),
    }


def _link(pipeline: Run, run: Run) -> str:
    return f"{run.folder.url}/report.html".removeprefix(f"{pipeline.folder.url}/")

"""report.html of an evaluation and of a pipeline: scores side by side, with gates and answers."""

from collections.abc import Mapping
from typing import Any

import tomli_w

from medgpt.eval.report import page
from medgpt.eval.results import GATES, RESULTS, REWARD, read_items, reward_results
from medgpt.eval.scores import BLEU_MARGIN, MARGIN, Column, Table, tables
from medgpt.runs import Run
from medgpt.train.findings import FINDINGS


def write_eval_report(run: Run) -> None:
    """Write report.html of a finished evaluation, beside its parent if it has one.

    With a parent also comparison.json: by task and metric, the paired test of the two.
    """
    results = run.folder.read_json(RESULTS)
    columns = [read_column(run.folder.url.rsplit("/", 1)[-1], run)]
    if results["parent"]:
        columns.insert(0, read_column("parent", Run(results["parent"])))
    scores = _scores(columns, results["seed"])
    if results["parent"]:
        run.folder.write_json("comparison.json", _comparison(scores["tables"]))
    html = page(
        "eval.html.jinja",
        name=run.folder.url.rsplit("/", 1)[-1],
        results=results,
        manifest=run.manifest,
        config=tomli_w.dumps(run.config),
        evidence=read_gates({"": run}),
        **scores,
    )
    run.folder.write_text("report.html", html)


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
        **_scores(columns, 0),
    )
    folder = pipeline.folder
    if not folder.exists("report.html") or folder.read_text("report.html") != html:
        folder.write_text("report.html", html)


def read_column(name: str, run: Run) -> Column:
    results = run.folder.read_json(RESULTS)
    return Column(name, results, {task: read_items(run, task) for task in results["tasks"]})


def _reward_column(name: str, run: Run) -> Column:
    """Of a reward model, which answers no task: how it tells held-out answers apart."""
    return Column(name, reward_results(run), {REWARD: []})


def read_gates(runs: Mapping[str, Run]) -> list[dict[str, Any]]:
    """Evidence of all gates, with the name of the stage."""
    return [
        {"stage": name, **item}
        for name, run in runs.items()
        if run.folder.exists(GATES)
        for item in run.folder.read_json(GATES)
    ]


def _comparison(found: list[Table]) -> dict[str, Any]:
    """Of the last column with the one before, where they answered the same questions."""
    return {
        table.task: {
            row.metric: {
                **row.changes[-1]._asdict(),
                "difference": row.changes[-1].difference._asdict(),
                "verdict": row.changes[-1].verdict,
            }
            for row in table.rows
            if row.changes[-1] is not None
        }
        for table in found
    }


def _scores(columns: list[Column], seed: int) -> dict[str, Any]:
    return {"tables": tables(columns, seed), "margin": MARGIN, "bleu_margin": BLEU_MARGIN}


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

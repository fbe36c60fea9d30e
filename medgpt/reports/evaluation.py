"""report.html of an evaluation: scores side by side, with gates and answers."""

from collections.abc import Mapping
from typing import Any

from medgpt.eval.results import GATES, RESULTS, read_items
from medgpt.reports.run import write_page
from medgpt.reports.scores import EvalColumn, TaskTable, build_task_tables
from medgpt.runs import Run


def write_eval_report(run: Run) -> None:
    """Write report.html of a finished evaluation, beside its parent if it has one.

    With a parent, also write comparison.json: the paired test for each task and metric.
    """
    results = run.folder.read_json(RESULTS)
    columns = [load_eval_column(run.folder.name, run)]
    if results["parent"]:
        columns.insert(0, load_eval_column("parent", Run(results["parent"])))
    tables = build_task_tables(columns, results["seed"])
    if results["parent"]:
        run.folder.write_json("comparison.json", _comparisons_to_json(tables))
    write_page(
        run,
        "eval.html.jinja",
        results=results,
        gate_results=load_gate_results({"": run}),
        tables=tables,
    )


def load_eval_column(name: str, run: Run) -> EvalColumn:
    results = run.folder.read_json(RESULTS)
    return EvalColumn(name, results, {task: read_items(run, task) for task in results["tasks"]})


def load_gate_results(runs: Mapping[str, Run]) -> list[dict[str, Any]]:
    """Return the results of all gates, with the names of their stages."""
    return [
        {"stage": name, **item}
        for name, run in runs.items()
        if run.folder.exists(GATES)
        for item in run.folder.read_json(GATES)
    ]


def _comparisons_to_json(tables: list[TaskTable]) -> dict[str, Any]:
    """Return the comparisons of the last column with the previous one, by task and metric."""
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
        for table in tables
    }

"""Writes items/, results.json and gates.json of an evaluation."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from medgpt.config.evaluation import EvalConfig
from medgpt.eval.gates import GateResult, check_gates
from medgpt.eval.requests import dummy_response
from medgpt.eval.results import GATES, LENGTH_METRICS, RESULTS, read_items
from medgpt.eval.stats import confidence_interval
from medgpt.eval.task import CorpusTask, ItemResult, Task, uses_chat_template
from medgpt.runs import Run

Scores = dict[str, dict[str, float]]
"""{metric: {value, low, high, n}}"""


def summarize_task(task: Task, items: Sequence[ItemResult], seed: int) -> dict[str, Any]:
    """Return the entry of a task in results.json."""
    corpus_scores = task.corpus_scores(items, seed) if isinstance(task, CorpusTask) else {}
    return {
        **provenance(task),
        "n": len(items),
        "seed": seed,
        "metrics": score_metrics(items, seed)
        | {metric: {**score._asdict(), "n": len(items)} for metric, score in corpus_scores.items()},
        "slices": score_slices(items, lambda group: score_metrics(group, seed)),
    }


def provenance(task: Task) -> dict[str, str]:
    """Return what the scores of a task depend on, apart from the model."""
    return {
        "kind": task.kind,
        "data_hash": task.data_hash,
        "template": task.template,
        "rules": task.rules,
    }


def score_slices(
    items: Sequence[ItemResult], score: Callable[[Sequence[ItemResult]], Scores]
) -> dict[str, dict[str, Scores]]:
    """Return {slice name: {slice value: scores of its items}}."""
    groups: dict[str, dict[str, list[ItemResult]]] = {}
    for item in items:
        for name, value in item.slices.items():
            groups.setdefault(name, {}).setdefault(value, []).append(item)
    return {
        name: {value: score(group) for value, group in sorted(by_value.items())}
        for name, by_value in groups.items()
    }


def score_metrics(items: Sequence[ItemResult], seed: int) -> Scores:
    """Return the scores of items, each over the items that have the metric."""
    terms_by_metric: dict[str, list[tuple[float, float]]] = {}
    for item in items:
        for name, value in item.values.items():
            terms = (value, 1.0) if isinstance(value, int | float) else (value[0], value[1])
            terms_by_metric.setdefault(name, []).append(terms)
    scores = {}
    for name, pairs in terms_by_metric.items():
        value, low, high = confidence_interval(
            np.array(pairs, np.float64), seed, is_proportion=name not in LENGTH_METRICS
        )
        scores[name] = {"value": value, "n": len(pairs), "low": low, "high": high}
    return scores


def placeholder_results(tasks: Sequence[Task]) -> dict[str, Any]:
    """Return results.json with all scores 0, to check the names in gates before a model runs."""
    zero_score = {"value": 0.0, "low": 0.0, "high": 0.0, "n": 0}

    def zero_scores(items: Sequence[ItemResult]) -> Scores:
        return {metric: zero_score for item in items for metric in item.values}

    results = {}
    for task in tasks:
        items = task.grade({request.id: dummy_response(request) for request in task.requests()})
        corpus_metrics = task.corpus_metrics if isinstance(task, CorpusTask) else ()
        metrics = zero_scores(items) | dict.fromkeys(corpus_metrics, zero_score)
        slices = score_slices(items, zero_scores)
        results[task.name] = {**provenance(task), "metrics": metrics, "slices": slices}
    return {"tasks": results}


def write_items(run: Run, task: Task, items: Sequence[ItemResult]) -> None:
    """Write items/TASK.jsonl, without texts if the task is sensitive."""
    items = [replace(item, shown={}) if task.sensitive else item for item in items]
    (run.folder / "items").write_jsonl(f"{task.name}.jsonl", map(asdict, items))


def write_results(
    run: Run, config: EvalConfig, tasks: Sequence[Task], chat_template: str | None
) -> None:
    """Write results.json from the items of all tasks.

    Args:
        chat_template: digest of the model's chat template.
    """
    seed = config.run.seed
    summaries = {
        task.name: summarize_task(task, read_items(run, task.name), seed)
        | {"chat_template": chat_template if uses_chat_template(task) else None}
        for task in tasks
    }
    run.folder.write_json(
        RESULTS,
        {
            "model": config.model.name,
            "untrained": config.model.untrained,
            "parent": config.model.parent,
            "seed": seed,
            "tasks": summaries,
        },
    )


def write_gates(run: Run, config: EvalConfig) -> list[GateResult]:
    """Check the gates, write gates.json and return the results. Raises as `check_gates`."""
    gate_results = check_gates(
        config.gates, run.folder.read_json(RESULTS), read_parent_results(config)
    )
    run.folder.write_json(GATES, [asdict(item) for item in gate_results])
    return gate_results


def read_parent_results(config: EvalConfig) -> dict[str, Any] | None:
    """Return results.json of the parent evaluation, or None without a parent."""
    parent = config.model.parent
    return Run(parent).folder.read_json(RESULTS) if parent else None

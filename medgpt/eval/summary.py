"""What the items of a task add up to: its part of results.json."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from medgpt.config.evaluation import EvalConfig
from medgpt.eval.gates import Evidence, check_gates
from medgpt.eval.requests import blank
from medgpt.eval.results import GATES, LENGTHS, RESULTS, read_items
from medgpt.eval.stats import interval
from medgpt.eval.task import CorpusTask, ItemResult, Task, is_chat
from medgpt.runs import Run


def summary(task: Task, items: Sequence[ItemResult], seed: int) -> dict[str, Any]:
    """A task's part of results.json."""
    whole = task.corpus(items, seed) if isinstance(task, CorpusTask) else {}
    return {
        **provenance(task),
        "n": len(items),
        "seed": seed,
        "metrics": metrics(items, seed)
        | {metric: {**score._asdict(), "n": len(items)} for metric, score in whole.items()},
        "slices": {
            name: {value: metrics(part, seed) for value, part in sorted(groups.items())}
            for name, groups in sliced(items).items()
        },
    }


def provenance(task: Task) -> dict[str, str]:
    """What its scores depend on, beside the model."""
    return {
        "kind": task.kind,
        "data_hash": task.data_hash,
        "template": task.template,
        "rules": task.rules,
    }


def sliced(items: Sequence[ItemResult]) -> dict[str, dict[str, list[ItemResult]]]:
    """Items by the name of a slice and its value."""
    found: dict[str, dict[str, list[ItemResult]]] = {}
    for item in items:
        for name, value in item.slices.items():
            found.setdefault(name, {}).setdefault(value, []).append(item)
    return found


def metrics(items: Sequence[ItemResult], seed: int) -> dict[str, dict[str, float]]:
    """{metric: {value, n, low, high}} over the items that have it."""
    found: dict[str, list[tuple[float, float]]] = {}
    for item in items:
        for name, value in item.values.items():
            pair = (value, 1.0) if isinstance(value, int | float) else (value[0], value[1])
            found.setdefault(name, []).append(pair)
    result = {}
    for name, pairs in found.items():
        values = np.array(pairs, dtype=np.float64)
        value, low, high = interval(values, seed, share=name not in LENGTHS)
        result[name] = {"value": value, "n": len(pairs), "low": low, "high": high}
    return result


def outline(tasks: Sequence[Task]) -> dict[str, Any]:
    """results.json as it will be, with all scores 0: gates can be checked against it before a model
    is asked."""
    nothing = {"value": 0.0, "low": 0.0, "high": 0.0, "n": 0}
    found = {}
    for task in tasks:
        items = task.judge({request.id: blank(request) for request in task.requests()})
        names = {metric: nothing for item in items for metric in item.values}
        if isinstance(task, CorpusTask):
            names |= dict.fromkeys(task.corpus_metrics, nothing)
        slices = {
            name: {
                value: {metric: nothing for item in part for metric in item.values}
                for value, part in groups.items()
            }
            for name, groups in sliced(items).items()
        }
        found[task.name] = {**provenance(task), "metrics": names, "slices": slices}
    return {"tasks": found}


def write_items(run: Run, task: Task, judged: Sequence[ItemResult]) -> None:
    """items/TASK.jsonl; of a sensitive task without the texts."""
    items = [replace(item, shown={}) if task.sensitive else item for item in judged]
    lines = [json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items]
    (run.folder / "items").write_text(f"{task.name}.jsonl", "".join(lines))


def write_results(
    run: Run, config: EvalConfig, tasks: Sequence[Task], template: str | None
) -> None:
    """results.json, from the items of all tasks; `template` is the digest of the model's."""
    seed = config.run.seed
    summaries = {
        task.name: summary(task, read_items(run, task.name), seed)
        | {"chat_template": template if is_chat(task) else None}
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


def write_gates(run: Run, config: EvalConfig) -> list[Evidence]:
    """gates.json: what the gates saw. Raises ConfigError: one names no score, or has no parent."""
    evidence = check_gates(config.gates, run.folder.read_json(RESULTS), parent_results(config))
    run.folder.write_json(GATES, [asdict(item) for item in evidence])
    return evidence


def parent_results(config: EvalConfig) -> dict[str, Any] | None:
    """results.json of the parent."""
    parent = config.model.parent
    return Run(parent).folder.read_json(RESULTS) if parent else None

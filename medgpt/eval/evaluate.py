"""`medgpt eval`: ask a model what the tasks want to know, and write down what it is worth."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from medgpt.config import ConfigError, EvalConfig
from medgpt.eval.gates import Evidence, check_gates, require
from medgpt.eval.pool import Pool, Responses, resolve_model
from medgpt.eval.requests import Choose, Reply, Request
from medgpt.eval.results import GATES, RESULTS, read_items
from medgpt.eval.stats import Interval, interval
from medgpt.eval.task import CorpusTask, Judged, Task
from medgpt.eval.tasks.generation import GenerationTask
from medgpt.eval.tasks.key_points import KeyPointsTask
from medgpt.eval.tasks.mcq import McqTask
from medgpt.eval.tasks.nll import NllTask
from medgpt.eval.tasks.safety import SafetyTask
from medgpt.eval.tasks.triage import TriageTask
from medgpt.metrics import ConsoleReporter
from medgpt.models.tokenizer import load_base
from medgpt.runs import Run, checksum
from medgpt.train import session
from medgpt.train.card import add_scores
from medgpt.train.room import await_room

TASKS: dict[str, Callable[[Any, int], Task]] = {
    "mcq": McqTask,
    "nll": NllTask,
    "generation": GenerationTask,
    "key_points": KeyPointsTask,
    "triage": TriageTask,
    "safety": SafetyTask,
}


def run_eval(config: EvalConfig) -> Run:
    """Run or resume an evaluation; a finished one is returned as it is.

    Raises:
        ConfigError: whatever the user can repair, in words.
        GateFailure: the model did not reach what its gates demand.
    """
    check_parent(config)
    if config.model.name is None:
        raise ConfigError("missing key model.name; name the run or model to score")
    folder = resolve_model(config.model.name)
    run = Run.open("eval", config, run_dir=config.run.dir, allow_changes=config.run.allow_changes)
    reporter = ConsoleReporter("eval")
    try:
        check_model_unchanged(run, folder)
        if run.finished:
            reporter.say(f"{run.folder.url} is finished; choose another run.dir to score again")
        else:
            tasks = build_tasks(config)
            check_template(folder, tasks)
            whole = _answer(run, config, tasks, reporter)
            write_results(run, config, tasks, whole)
            run.update_manifest(finished=True)
        _show(run, reporter)
        evidence = write_gates(run, config)
        _report(run)
        for item in evidence:
            reporter.say(f"gate {'passed' if item.passed else 'FAILED'}: {item}")
        reporter.say(f"report in {run.folder.url}/report.html")
        require(evidence)
    finally:
        reporter.close()
    return run


def build_tasks(config: EvalConfig) -> list[Task]:
    """Raises ConfigError: the data of one is wrong."""
    tasks = []
    for kind, task, name in config.tasks():
        try:
            tasks.append(TASKS[kind](task, config.run.seed))
        except ConfigError as error:
            raise ConfigError(f"task {name}: {error}") from None
        _check_ids(tasks[-1])
    return tasks


def _check_ids(task: Task) -> None:
    ids = [request.id for request in task.requests()]
    assert len(set(ids)) == len(ids), f"task {task.name} asks under one id twice"


def check_parent(config: EvalConfig) -> None:
    """Raises ConfigError: model.parent is set and is no finished evaluation."""
    parent = config.model.parent
    if parent is not None and not Run(parent).folder.exists(RESULTS):
        raise ConfigError(
            f"model.parent={parent}: no {RESULTS} in it; give the run directory of an evaluation "
            "that is finished, or leave it out"
        )


def check_template(folder: str, tasks: Sequence[Task]) -> None:
    """Raises ConfigError: a task talks to the model, which has no chat template."""
    talking = [task.name for task in tasks if any(map(_is_chat, task.requests()))]
    if talking and load_base(folder).chat_template is None:
        raise ConfigError(
            f"task {talking[0]} needs a chat template, and the model in {folder} has none; set "
            "prompt=plain for it, or score a model that was fine-tuned on conversations"
        )


def _is_chat(request: Request) -> bool:
    return isinstance(request, Choose | Reply) and not isinstance(request.prompt, str)


def check_model_unchanged(run: Run, folder: str) -> None:
    """Raises ConfigError: the run began with other weights than there are in `folder` now."""
    weights = {path.name: checksum(path) for path in sorted(Path(folder).glob("*.safetensors"))}
    known = run.manifest.get("weights", weights)
    if known != weights:
        raise ConfigError(
            f"run.dir={run.folder.url}: the model in {folder} has other weights than when the "
            "evaluation began; choose another run.dir"
        )
    if "weights" not in run.manifest:
        run.update_manifest(weights=weights, seed=run.config["run"]["seed"])


def _answer(
    run: Run, config: EvalConfig, tasks: Sequence[Task], reporter: ConsoleReporter
) -> dict[str, dict[str, Interval]]:
    """Ask all that is not answered yet, and write items/ of each task.

    Returns:
        By task, scores of all its responses together that are no mean over items.
    """
    whole: dict[str, dict[str, Interval]] = {}
    reporter.say(f"run directory {run.folder.url}")
    session.connect(config.cluster)
    await_room(config.cluster, reporter.say)
    pool = Pool(config)
    try:
        for task in tasks:
            requests, folder = task.requests(), Responses(run.folder / "responses" / task.name)
            total, name = len(requests), task.name

            def advance(done: int, name: str = name, total: int = total) -> None:
                reporter.advance(name, done, total, say=True)

            pool.ask(requests, folder, advance)
            responses = folder.read(requests)
            write_items(run, task, task.judge(responses))
            if isinstance(task, CorpusTask):
                whole[task.name] = task.corpus(responses, config.run.seed)
    finally:
        pool.close()
    return whole


def write_items(run: Run, task: Task, judged: Sequence[Judged]) -> None:
    """items/TASK.jsonl; of a sensitive task without the texts."""
    items = [replace(item, shown={}) if task.sensitive else item for item in judged]
    lines = [json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items]
    (run.folder / "items").write_text(f"{task.name}.jsonl", "".join(lines))


def write_results(
    run: Run,
    config: EvalConfig,
    tasks: Sequence[Task],
    whole: Mapping[str, Mapping[str, Interval]],
) -> None:
    """results.json, from the items of all tasks and the scores that `_answer` gave."""
    seed = config.run.seed
    summaries = {task.name: summary(task, read_items(run, task.name), seed) for task in tasks}
    for name, scores in whole.items():
        n = summaries[name]["n"]
        summaries[name]["metrics"] |= {
            metric: {**score._asdict(), "n": n} for metric, score in scores.items()
        }
    run.folder.write_json(
        RESULTS,
        {
            "model": config.model.name,
            "parent": config.model.parent,
            "seed": seed,
            "tasks": summaries,
        },
    )


def summary(task: Task, items: Sequence[Judged], seed: int) -> dict[str, Any]:
    """A task's part of results.json."""
    slices: dict[str, dict[str, list[Judged]]] = {}
    for item in items:
        for name, value in item.slices.items():
            slices.setdefault(name, {}).setdefault(value, []).append(item)
    return {
        "kind": task.kind,
        "n": len(items),
        "data_hash": task.data_hash,
        "template": task.template,
        "seed": seed,
        "metrics": metrics(items, seed),
        "slices": {
            name: {value: metrics(part, seed) for value, part in sorted(groups.items())}
            for name, groups in slices.items()
        },
    }


def metrics(items: Sequence[Judged], seed: int) -> dict[str, dict[str, float]]:
    """{metric: {value, n, low, high}} over the items that have it."""
    found: dict[str, list[tuple[float, float]]] = {}
    for item in items:
        for name, value in item.values.items():
            pair = (value, 1.0) if isinstance(value, int | float) else (value[0], value[1])
            found.setdefault(name, []).append(pair)
    result = {}
    for name, pairs in found.items():
        value, low, high = interval(np.array(pairs, dtype=np.float64), seed)
        result[name] = {"value": value, "n": len(pairs), "low": low, "high": high}
    return result


def write_gates(run: Run, config: EvalConfig) -> list[Evidence]:
    """gates.json: what the gates saw. Raises ConfigError: one names no score, or has no parent."""
    parent = config.model.parent
    of_parent = Run(parent).folder.read_json(RESULTS) if parent else None
    evidence = check_gates(config.gates, run.folder.read_json(RESULTS), of_parent)
    run.folder.write_json(GATES, [asdict(item) for item in evidence])
    return evidence


def _report(run: Run) -> None:
    from medgpt.eval.pipeline_report import write_eval_report  # matplotlib would delay the start

    write_eval_report(run)
    add_scores(run.folder.read_json(RESULTS))


def _show(run: Run, reporter: ConsoleReporter) -> None:
    for name, task in run.folder.read_json(RESULTS)["tasks"].items():
        for metric, score in task["metrics"].items():
            reporter.say(
                f"{name}.{metric} {score['value']:.4f} ({score['low']:.4f} to {score['high']:.4f}, "
                f"95 %, n={score['n']})"
            )
    reporter.say(f"results in {run.folder.url}/{RESULTS}")

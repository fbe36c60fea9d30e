"""`medgpt eval`: ask a model what the tasks want to know, and write down what it is worth."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from medgpt.artefacts import checksum
from medgpt.config import ConfigError, EvalConfig
from medgpt.data.rows import content_hash
from medgpt.eval.gates import Evidence, check_gates, require
from medgpt.eval.pool import Pool, Responses, resolve_model
from medgpt.eval.requests import Choose, Reply
from medgpt.eval.results import GATES, RESULTS, read_items
from medgpt.eval.summary import outline, summary
from medgpt.eval.task import Judged, Task
from medgpt.eval.tasks.generation import GenerationTask
from medgpt.eval.tasks.key_points import KeyPointsTask
from medgpt.eval.tasks.mcq import McqTask
from medgpt.eval.tasks.nll import NllTask
from medgpt.eval.tasks.safety import SafetyTask
from medgpt.eval.tasks.triage import TriageTask
from medgpt.metrics import ConsoleReporter
from medgpt.models.generate import check_generates
from medgpt.models.tokenizer import load_base
from medgpt.runs import Run
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
    check_generates(folder, config.model.trust_remote_code)
    run = Run.open("eval", config, run_dir=config.run.dir, allow_changes=config.run.allow_changes)
    reporter = ConsoleReporter("eval")
    try:
        check_model_unchanged(run, folder)
        if run.finished:
            reporter.say(f"{run.folder.url} is finished; choose another run.dir to score again")
            run.record(config)
        else:
            tasks = build_tasks(config)
            template = check_template(config, folder, tasks)
            if config.gates:  # before a model is asked
                check_gates(config.gates, outline(tasks), _of_parent(config))
            _answer(run, config, tasks, reporter)
            write_results(run, config, tasks, template)
            run.update_manifest(finished=True)
        _show(run, reporter)
        try:
            evidence = write_gates(run, config)
        finally:  # gates may change after the answers came, and be wrong
            report(run, config, reporter)
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


def check_template(config: EvalConfig, folder: str, tasks: Sequence[Task]) -> str | None:
    """A digest of the model's chat template, if it has one.

    Raises:
        ConfigError: a task talks to the model, which has none.
    """
    template = load_base(folder, config.model.trust_remote_code).chat_template
    if template is not None:
        return content_hash(str(template))
    if talking := [task.name for task in tasks if _is_chat(task)]:
        raise ConfigError(
            f"task {talking[0]} needs a chat template, and the model in {folder} has none; set "
            "prompt=plain for it, or score a model that was fine-tuned on conversations"
        )
    return None


def _is_chat(task: Task) -> bool:
    return any(
        isinstance(request, Choose | Reply) and not isinstance(request.prompt, str)
        for request in task.requests()
    )


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


def _answer(run: Run, config: EvalConfig, tasks: Sequence[Task], reporter: ConsoleReporter) -> None:
    """Ask all that is not answered yet, and write items/ of each task."""
    reporter.say(f"run directory {run.folder.url}")
    session.connect(config.cluster)
    await_room(config.cluster, reporter.say)
    pool = Pool(config, reporter.say)
    try:
        for task in tasks:
            requests, folder = task.requests(), Responses(run.folder / "responses" / task.name)
            total, name = len(requests), task.name

            def advance(done: int, name: str = name, total: int = total) -> None:
                reporter.advance(name, done, total, say=True)

            pool.ask(requests, folder, advance)
            write_items(run, task, task.judge(folder.read(requests)))
    finally:
        pool.close()


def write_items(run: Run, task: Task, judged: Sequence[Judged]) -> None:
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
        | {"chat_template": template if _is_chat(task) else None}
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
    evidence = check_gates(config.gates, run.folder.read_json(RESULTS), _of_parent(config))
    run.folder.write_json(GATES, [asdict(item) for item in evidence])
    return evidence


def _of_parent(config: EvalConfig) -> dict[str, Any] | None:
    """results.json of the parent."""
    parent = config.model.parent
    return Run(parent).folder.read_json(RESULTS) if parent else None


def report(run: Run, config: EvalConfig, reporter: ConsoleReporter) -> None:
    """report.html, beside the parent of the config as it is now, and the model's card."""
    from medgpt.eval.pipeline_report import write_eval_report  # matplotlib would delay the start

    results = run.folder.read_json(RESULTS)
    if results["parent"] != config.model.parent:
        run.folder.write_json(RESULTS, {**results, "parent": config.model.parent})
    write_eval_report(run)
    if config.model.untrained:
        return
    try:
        add_scores(results)
    except OSError as error:
        reporter.say(f"the model's card stays as it is, it cannot be written: {error}")


def _show(run: Run, reporter: ConsoleReporter) -> None:
    for name, task in run.folder.read_json(RESULTS)["tasks"].items():
        for metric, score in task["metrics"].items():
            reporter.say(
                f"{name}.{metric} {score['value']:.4f} ({score['low']:.4f} to {score['high']:.4f}, "
                f"95 %, n={score['n']})"
            )
    reporter.say(f"results in {run.folder.url}/{RESULTS}")

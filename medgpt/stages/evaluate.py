"""`medgpt eval`: run the tasks on a model, then write scores, gates and the report."""

from collections.abc import Sequence
from functools import partial

from medgpt.cluster import ray_init
from medgpt.cluster.wait_for_resources import wait_for_resources
from medgpt.config.base import ConfigError
from medgpt.config.evaluation import EvalConfig
from medgpt.eval.engine_pool import EnginePool, ResponseStore, resolve_model
from medgpt.eval.gates import check_gates, require_passed
from medgpt.eval.preparation import build_tasks, check_model_unchanged, check_parent, check_template
from medgpt.eval.results import RESULTS
from medgpt.eval.summary import (
    placeholder_results,
    read_parent_results,
    write_gates,
    write_items,
    write_results,
)
from medgpt.eval.task import Task
from medgpt.metrics import ConsoleReporter
from medgpt.models.generate import check_causal_model
from medgpt.runs import Run
from medgpt.stages.opening import open_stage
from medgpt.train.model_card import add_scores


def run_eval(config: EvalConfig) -> Run:
    """Score a model; raise GateFailure if the scores do not pass the gates."""
    check_parent(config)
    if config.model.name is None:
        raise ConfigError("missing key model.name; name the run or model to score")
    folder = resolve_model(config.model.name)
    check_causal_model(folder, config.model.trust_remote_code)
    with open_stage("eval", config, "score") as (run, reporter):
        check_model_unchanged(run, folder)
        if run.finished:
            run.write_config(config)
        else:
            tasks = build_tasks(config)
            template = check_template(config, folder, tasks)
            if config.gates:  # before the model is loaded
                check_gates(config.gates, placeholder_results(tasks), read_parent_results(config))
            _answer_tasks(run, config, tasks, reporter)
            write_results(run, config, tasks, template)
            run.update_manifest(finished=True)
        _print_scores(run, reporter)
        try:
            gate_results = write_gates(run, config)
        finally:  # gates may have been edited since the answers were written, and be invalid
            write_report_and_card(run, config, reporter)
        for item in gate_results:
            reporter.say(f"gate {'passed' if item.passed else 'FAILED'}: {item}")
        reporter.say(f"report in {run.folder.url}/report.html")
        require_passed(gate_results)
    return run


def _answer_tasks(
    run: Run, config: EvalConfig, tasks: Sequence[Task], reporter: ConsoleReporter
) -> None:
    """Send the unanswered requests to the engines and write items/ of each task."""
    ray_init.init_ray(config.cluster)
    wait_for_resources(config.cluster, reporter.say)
    pool = EnginePool(config, reporter.say)
    try:
        for task in tasks:
            requests, store = task.requests(), ResponseStore(run.folder / "responses" / task.name)
            total = len(requests)
            pool.answer_all(
                requests, store, partial(reporter.advance, task.name, total=total, print_line=True)
            )
            write_items(run, task, task.grade(store.read(requests)))
    finally:
        pool.close()


def write_report_and_card(run: Run, config: EvalConfig, reporter: ConsoleReporter) -> None:
    """Write report.html beside the config's current parent; add the scores to the model card."""
    from medgpt.reports.evaluation import write_eval_report  # matplotlib would delay the start

    results = run.folder.read_json(RESULTS)
    if results["parent"] != config.model.parent:
        run.folder.write_json(RESULTS, {**results, "parent": config.model.parent})
    write_eval_report(run)
    if config.model.untrained:
        return
    try:
        add_scores(results)
    except OSError as error:
        reporter.say(f"cannot write the model card, it is unchanged: {error}")


def _print_scores(run: Run, reporter: ConsoleReporter) -> None:
    for name, task in run.folder.read_json(RESULTS)["tasks"].items():
        for metric, score in task["metrics"].items():
            reporter.say(
                f"{name}.{metric} {score['value']:.4f} ({score['low']:.4f} to {score['high']:.4f}, "
                f"95 %, n={score['n']})"
            )
    reporter.say(f"results in {run.folder.url}/{RESULTS}")

"""The summary at the end of a pipeline: answers before and after training, gates, next commands."""

import os
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from medgpt.config.evaluation import EvalConfig
from medgpt.eval.results import RESULTS, read_items
from medgpt.metrics import ConsoleReporter
from medgpt.reports.evaluation import load_gate_results
from medgpt.runs import Run
from medgpt.stages.pipeline_stages import LoadedStage

SHOWN_QUESTION_KINDS = ("pretrain", "sft", "rlhf")  # kinds of key-point questions in the table
MAX_CHARACTERS = 22  # per answer
GENERATIVE_KINDS = ("pretrain", "sft", "dpo", "ppo")


def print_summary(pipeline: Run, stages: Sequence[LoadedStage]) -> None:
    """Print a table of answers, the number of passed gates, the report and what to do next."""
    reporter = ConsoleReporter("pipeline")
    table = answers_table([stage for stage in stages if stage.kind == "eval"])
    if table.row_count:
        reporter.console.print(table, soft_wrap=False)
    gates = load_gate_results({stage.name: stage.run for stage in stages})
    if gates:
        reporter.say(f"gates: {sum(gate['passed'] for gate in gates)} of {len(gates)} passed")
    reporter.say(f"report in {pipeline.folder.url}/report.html")
    for purpose, command in next_commands(stages):
        reporter.say(f"{purpose}:\n    {command}")
    reporter.close()


def answers_table(evaluations: Sequence[LoadedStage]) -> Table:
    """Return the answers of the first and the last evaluated model to the same questions."""
    table = Table(show_lines=True)
    table.add_column("question", overflow="fold")
    columns = list({stage.name: stage for stage in (*evaluations[:1], *evaluations[-1:])}.values())
    for stage in columns:
        is_untrained = isinstance(stage.config, EvalConfig) and stage.config.model.untrained
        name = "before training" if is_untrained else f"final model ({stage.name})"
        table.add_column(name, overflow="fold")
    answers = [_read_answers(stage.run) for stage in columns]
    for question in answers[-1] if answers else ():
        texts = [_shorten(by_question.get(question, "")) for by_question in answers]
        table.add_row(Text(question), *map(Text, texts))
    return table


def next_commands(stages: Sequence[LoadedStage]) -> list[tuple[str, str]]:
    """Return (purpose, command) of what a user may do with the trained models."""
    run_dirs = {stage.kind: _relative(stage.config.run.dir) for stage in stages}  # last of a kind
    models = [run_dirs[kind] for kind in GENERATIVE_KINDS if kind in run_dirs]
    commands = []
    if models:
        commands.append(("chat with the final model", f"medgpt chat {models[-1]}"))
    if "eval" in run_dirs:
        command = f"medgpt eval YOUR_MODEL {run_dirs['eval']}/config.toml run.dir=runs/my-eval"
        commands.append(("evaluate your own model", f"{command} 'gates=[]'"))
    if "sft" in run_dirs:
        command = f"medgpt sft {run_dirs['sft']}/config.toml run.dir=runs/my-sft"
        paths = """'data.sources.0.paths=["YOUR.jsonl"]'"""
        commands.append(("train on your own data", f"{command} {paths}"))
    return commands


def _read_answers(run: Run) -> dict[str, str]:
    """Return the answers that may be shown, by question."""
    return {
        item.shown["question"]: item.shown["answer"]
        for name, task in run.folder.read_json(RESULTS)["tasks"].items()
        if task["kind"] == "key_points"
        for item in read_items(run, name)
        if item.slices["kind"] in SHOWN_QUESTION_KINDS and item.shown
    }


def _shorten(answer: str) -> str:
    text = " ".join(answer.split())
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}…"


def _relative(run_dir: str) -> str:
    """Return a path below the current folder as a relative path."""
    here = os.getcwd() + os.sep
    return run_dir.removeprefix(here)

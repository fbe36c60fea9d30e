"""Builds the tasks of an evaluation and checks its inputs before a model is loaded."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medgpt.artifacts import checksum
from medgpt.config.base import ConfigError
from medgpt.config.evaluation import EvalConfig
from medgpt.data.sources.sampling import hash_texts
from medgpt.eval.results import RESULTS
from medgpt.eval.task import Task, uses_chat_template
from medgpt.eval.tasks.generation import GenerationTask
from medgpt.eval.tasks.key_points import KeyPointsTask
from medgpt.eval.tasks.mcq import McqTask
from medgpt.eval.tasks.nll import NllTask
from medgpt.eval.tasks.safety import SafetyTask
from medgpt.eval.tasks.triage import TriageTask
from medgpt.models.tokenizer import load_tokenizer
from medgpt.runs import Run

TASKS: dict[str, Callable[[Any, int], Task]] = {
    "mcq": McqTask,
    "nll": NllTask,
    "generation": GenerationTask,
    "key_points": KeyPointsTask,
    "triage": TriageTask,
    "safety": SafetyTask,
}


def build_tasks(config: EvalConfig) -> list[Task]:
    """Build the tasks of a config. Raises ConfigError if the data of one is wrong."""
    tasks = []
    for kind, task, name in config.tasks():
        try:
            tasks.append(TASKS[kind](task, config.run.seed))
        except ConfigError as error:
            raise ConfigError(f"task {name}: {error}") from None
        ids = [request.id for request in tasks[-1].requests()]
        assert len(set(ids)) == len(ids), f"task {name} has two requests with one id"
    return tasks


def check_parent(config: EvalConfig) -> None:
    """Raise ConfigError if model.parent is set but is not a finished evaluation."""
    parent = config.model.parent
    if parent is not None and not Run(parent).folder.exists(RESULTS):
        raise ConfigError(
            f"model.parent={parent}: has no {RESULTS}; give the run directory of a finished "
            "evaluation, or leave it out"
        )


def check_template(config: EvalConfig, folder: str, tasks: Sequence[Task]) -> str | None:
    """Return a digest of the model's chat template, or None if it has none.

    Raises:
        ConfigError: a task needs a chat template and the model has none.
    """
    template = load_tokenizer(folder, config.model.trust_remote_code).chat_template
    if template is not None:
        model = config.model
        if model.thinking == "auto" and model.thinking_tokens is None:
            return hash_texts(str(template))
        return hash_texts(str(template), f"{model.thinking} {model.thinking_tokens}")
    if chat_tasks := [task.name for task in tasks if uses_chat_template(task)]:
        raise ConfigError(
            f"task {chat_tasks[0]} needs a chat template, but the model in {folder} has none; set "
            "prompt=plain for it, or evaluate a model that was fine-tuned on conversations"
        )
    return None


def check_model_unchanged(run: Run, folder: str) -> None:
    """Raise ConfigError if the weights in `folder` differ from those when the run started."""
    weights = {path.name: checksum(path) for path in sorted(Path(folder).glob("*.safetensors"))}
    if run.manifest.get("weights", weights) != weights:
        raise ConfigError(
            f"run.dir={run.folder.url}: the model in {folder} has other weights than when the "
            "evaluation started; choose another run.dir"
        )
    if "weights" not in run.manifest:
        run.update_manifest(weights=weights, seed=run.config["run"]["seed"])

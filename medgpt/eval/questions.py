"""The sample corpus's held-out prompts, asked of trained models."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ray
import torch

from medgpt.eval.keypoints import stated
from medgpt.models.generate import answer_all, continue_all, load_for_generation
from medgpt.runs import Folder

MAX_NEW_TOKENS = 192


@dataclass(frozen=True)
class Answer:
    """What a model said to a held-out prompt."""

    kind: str  # pretrain, sft, rlhf: the stage the prompt is for; phrasing; left_out
    prompt: str
    text: str
    key_points: list[list[str]]
    stated: list[bool]

    @property
    def passed(self) -> bool:
        return all(self.stated)

    @property
    def missing(self) -> list[str]:
        """Key points that the answer does not state."""
        points = zip(self.key_points, self.stated, strict=True)
        return [wordings[0] for wordings, found in points if not found]


def ask(corpus_url: str, models: dict[str, str], *, num_cpus: float) -> list[Answer]:
    """Answers to all held-out prompts, greedy.

    Args:
        corpus_url: folder with held_out.jsonl.
        models: model folder of each stage; a prompt goes to its stage's, else to the last.
    """
    lines = Folder(corpus_url).read_text("held_out.jsonl").splitlines()
    held_out = [json.loads(line) for line in lines]
    last = list(models)[-1]
    asked: dict[str, list[dict[str, Any]]] = {stage: [] for stage in models}
    for question in held_out:
        asked[question["kind"] if question["kind"] in models else last].append(question)
    task = ray.remote(num_cpus=num_cpus)(_ask_model)
    pending = [
        task.remote(models[stage], stage != "pretrain", [q["prompt"] for q in asked[stage]])
        for stage in models
    ]
    texts = dict(zip(models, ray.get(pending), strict=True))
    return [
        Answer(q["kind"], q["prompt"], text, q["key_points"], stated(text, q["key_points"]))
        for stage, questions in asked.items()
        for q, text in zip(questions, texts[stage], strict=True)
    ]


def _ask_model(folder: str, chat: bool, prompts: list[str]) -> list[str]:
    if not prompts:
        return []
    with Folder(folder).local() as directory:
        model, tokenizer = load_for_generation(str(directory), torch.device("cpu"))
    speak = answer_all if chat else continue_all
    return speak(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS)


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Counts for the report and the exit status."""
    by_kind: dict[str, list[Answer]] = {}
    for item in answers:
        by_kind.setdefault(item.kind, []).append(item)
    return {
        kind: {
            "asked": len(items),
            "passed": sum(item.passed for item in items),
            "key_points": sum(len(item.stated) for item in items),
            "stated": sum(sum(item.stated) for item in items),
        }
        for kind, items in by_kind.items()
    }


def as_json(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    return [{**asdict(item), "passed": item.passed} for item in answers]


def from_json(items: list[dict[str, Any]]) -> list[Answer]:
    return [Answer(**{k: v for k, v in item.items() if k != "passed"}) for item in items]

"""Do answers state given facts? Questions that a sample corpus holds back, or a file of such."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medgpt.config import ConfigError, KeyPointsConfig
from medgpt.data.rows import content_hash, draw, numbered_rows
from medgpt.eval.requests import Prompt, Replied, Reply, Request, Response
from medgpt.eval.task import Judged, Value
from medgpt.eval.tasks.prompts import asked
from medgpt.medical.statements import stated

STATEMENTS = "pretrain"  # the kind of questions that are beginnings of texts


@dataclass(frozen=True, slots=True)
class Question:
    id: str
    prompt: str
    key_points: tuple[tuple[str, ...], ...]
    kind: str
    topic: str


class KeyPointsTask:
    """greedy_passed: the greedy answer states every key point; sampled_passed: every sampled one
    does. passed: all answers do. stated: share of the key points in greedy answers."""

    kind = "key_points"

    def __init__(self, config: KeyPointsConfig, seed: int) -> None:
        """Raises ConfigError: the file cannot be read, or no question is of the kinds."""
        self.name, self.sensitive = config.name, config.sensitive
        self._config, self._seed = config, seed
        found = [_question(place, row) for place, row in numbered_rows((config.path,))]
        kept = [q for q in found if not config.kinds or q.kind in config.kinds]
        if not kept:
            kinds = ", ".join(sorted({q.kind for q in found})) or "nothing"
            raise ConfigError(
                f"kinds={list(config.kinds)}: no such question in {config.path}, it has {kinds}"
            )
        self._questions = draw(((q.id, q) for q in kept), config.limit, seed)
        self.template = f"key-points-1-{config.prompt}-{config.max_new_tokens}"
        self.data_hash = content_hash(*(repr(question) for question in self._questions))

    def requests(self) -> list[Request]:
        config, found = self._config, []
        for question in self._questions:
            prompt = self._prompt(question)
            found.append(Reply(question.id, prompt, config.max_new_tokens))
            if config.samples:
                sampling = (config.temperature, config.samples, self._seed)
                key = f"{question.id}-samples"
                found.append(Reply(key, prompt, config.max_new_tokens, *sampling))
        return found

    def _prompt(self, question: Question) -> Prompt:
        if self._config.prompt == "plain":
            begins = question.kind == STATEMENTS
            return question.prompt if begins else asked(question.prompt, "plain")
        return asked(question.prompt, "chat")

    def judge(self, responses: Mapping[str, Response]) -> list[Judged]:
        return [self._judge(question, responses) for question in self._questions]

    def _judge(self, question: Question, responses: Mapping[str, Response]) -> Judged:
        (greedy,) = _texts(responses[question.id])
        found = stated(greedy, question.key_points)
        passed = all(found)
        values: dict[str, Value] = {
            "greedy_passed": float(passed),
            "stated": (float(sum(found)), float(len(found))),
        }
        if self._config.samples:
            drawn = _texts(responses[f"{question.id}-samples"])
            whole = [all(stated(text, question.key_points)) for text in drawn]
            values["sampled_passed"] = float(all(whole))
            values["sampled_share"] = (float(sum(whole)), float(len(whole)))
            passed = passed and all(whole)
        values["passed"] = float(passed)
        marks = [
            f"{'✓' if ok else '✗'} {q[0]}" for q, ok in zip(question.key_points, found, strict=True)
        ]
        return Judged(
            question.id,
            values,
            {"kind": question.kind} | ({"topic": question.topic} if question.topic else {}),
            {"question": question.prompt, "answer": greedy, "key points": "   ".join(marks)},
        )


def _texts(response: Response) -> list[str]:
    assert isinstance(response, Replied)
    return response.texts


def _question(place: str, row: dict[str, Any]) -> Question:
    """Raises ConfigError: the row is no question with key points."""
    try:
        points = tuple(tuple(wordings) for wordings in row["key_points"])
        prompt = row["prompt"]
    except (KeyError, TypeError):
        points, prompt = (), ""
    is_text = all(isinstance(wording, str) and wording for group in points for wording in group)
    if not prompt or not points or not all(points) or not is_text:
        raise ConfigError(
            f'{place}: needs prompt and key_points, as [["fact", "synonym"], ["fact"]]'
        )
    kind = str(row.get("kind", "question"))
    digest = content_hash(kind, prompt, json.dumps(points, ensure_ascii=False))
    return Question(f"{kind}-{digest}", prompt, points, kind, str(row.get("condition", "")))

"""Questions with the facts that their answers must state: held back by a corpus, or from a file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medgpt.config.base import ConfigError
from medgpt.data.sources.rows import content_hash, numbered_rows


@dataclass(frozen=True, slots=True)
class Question:
    id: str
    prompt: str
    key_points: tuple[tuple[str, ...], ...]
    kind: str
    topic: str


def read_questions(path: str, kinds: Sequence[str]) -> list[Question]:
    """Those of the kinds, or all; at least one.

    Raises:
        ConfigError: the file cannot be read, has a question twice, or none of the kinds.
    """
    found: dict[str, Question] = {}
    places: dict[str, str] = {}
    for place, row in numbered_rows((path,)):
        question = _question(place, row)
        if question.id in found:
            raise ConfigError(
                f"{place} is the same question as {places[question.id]}; remove one of them"
            )
        found[question.id], places[question.id] = question, place
    kept = [question for question in found.values() if not kinds or question.kind in kinds]
    if not kept:
        there = ", ".join(sorted({question.kind for question in found.values()})) or "nothing"
        raise ConfigError(f"kinds={list(kinds)}: no such question in {path}, it has {there}")
    return kept


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

"""Questions with the key points that their answers must state, read from a file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medgpt.config.base import ConfigError
from medgpt.data.sources.readers import read_located_rows
from medgpt.data.sources.sampling import hash_texts


@dataclass(frozen=True, slots=True)
class KeyPointQuestion:
    id: str
    prompt: str
    key_points: tuple[tuple[str, ...], ...]
    kind: str
    topic: str


def read_key_point_questions(path: str, kinds: Sequence[str]) -> list[KeyPointQuestion]:
    """Return the questions of the kinds, or all of them if no kind is given.

    Raises:
        ConfigError: the file cannot be read, repeats a question, or has none of the kinds.
    """
    questions: dict[str, KeyPointQuestion] = {}
    places: dict[str, str] = {}
    for place, row in read_located_rows((path,)):
        question = _parse_question(place, row)
        if question.id in questions:
            raise ConfigError(
                f"{place} is the same question as {places[question.id]}; remove one of them"
            )
        questions[question.id], places[question.id] = question, place
    selected = [q for q in questions.values() if not kinds or q.kind in kinds]
    if not selected:
        known_kinds = ", ".join(sorted({q.kind for q in questions.values()})) or "nothing"
        raise ConfigError(f"kinds={list(kinds)}: no such question in {path}, only {known_kinds}")
    return selected


def _parse_question(place: str, row: dict[str, Any]) -> KeyPointQuestion:
    """Parse a row. Raises ConfigError if it is not a question with key points."""
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
    digest = hash_texts(kind, prompt, json.dumps(points, ensure_ascii=False))
    return KeyPointQuestion(f"{kind}-{digest}", prompt, points, kind, str(row.get("condition", "")))

"""Reads preference data: prompts with several answers of which some are better."""

import math
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from medgpt.config.data import TurnsMapping
from medgpt.data.sources.records import Message, Origin, Preferences
from medgpt.data.sources.turns import (
    MalformedRow,
    RawRow,
    UnusableRow,
    check_turns,
    json_type,
    read_turns,
    require_column,
    require_text,
)

PAIR_COLUMNS = (
    ("prompt", "chosen", "rejected"),
    ("question", "chosen", "rejected"),
    ("question", "response_chosen", "response_rejected"),
)


class RankedAnswers(NamedTuple):
    """Content of a row, not yet checked."""

    prompt: list[Message]
    answers: list[list[Message]]  # (K,) what follows the prompt
    grades: list[float]  # (K,)


def pair_columns(row: RawRow) -> tuple[str, str, str] | None:
    """Return the columns of prompt, chosen and rejected answer, or None if the row has none."""
    return next((names for names in PAIR_COLUMNS if all(name in row for name in names)), None)


def read_pair(row: RawRow, history: Sequence[Message]) -> RankedAnswers:
    """Read prompt, chosen and rejected: texts or lists of messages. Answers may repeat the prompt.

    `history` holds the messages before the prompt: system message and earlier turns.

    Raises:
        MalformedRow: a column is missing or has another form.
    """
    columns = pair_columns(row)
    if columns is None and "prompt" not in row and "chosen" in row and "rejected" in row:
        return _split_shared_prompt(row, history)
    names = columns or PAIR_COLUMNS[0]
    prompt = [*history, *_column_messages(row, names[0], "user")]
    answers = [strip_prompt(prompt, _column_messages(row, name, "assistant")) for name in names[1:]]
    return RankedAnswers(prompt, answers, _pair_grades(row))


def make_preferences(ranked: RankedAnswers, origin: Origin) -> Preferences:
    """Check ranked answers and return them as a record.

    Raises:
        MalformedRow: the row breaks a rule.
        UnusableRow: the row has only one answer or equal grades.
    """
    prompt = check_turns(ranked.prompt, "the prompt", last_role="user")
    answers = [
        check_turns((*prompt, *answer), f"answer {number}")[len(prompt) :]
        for number, answer in enumerate(ranked.answers, start=1)
    ]
    if len(answers) < 2:
        raise UnusableRow("there is only one answer")
    if len(set(answers)) < len(answers):
        raise MalformedRow("two answers are equal")
    if not all(map(math.isfinite, ranked.grades)):
        raise MalformedRow("a grade is no finite number")
    if len(set(ranked.grades)) == 1:
        raise UnusableRow("no answer is better than another")
    return Preferences(
        source=origin.source,
        file=origin.file,
        row=origin.row,
        prompt=prompt,
        answers=tuple(answers),
        grades=tuple(ranked.grades),
    )


def strip_prompt(prompt: Sequence[Message], messages: list[Message]) -> list[Message]:
    """Return `messages` without the prompt if they start with it."""
    same = messages[: len(prompt)] == list(prompt)
    return messages[len(prompt) :] if same else messages


def require_number(value: object, location: str) -> float:
    """Return a number or a numeric text as float. Raises MalformedRow for anything else."""
    try:
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return float(value)
    except ValueError:
        pass
    raise MalformedRow(f"{location} is {json_type(value)}, must be a number")


def _column_messages(row: RawRow, column: str, role: Any) -> list[Message]:
    """Return the messages in a column; a text is one message of `role`."""
    value = require_column(row, column)
    if isinstance(value, list):
        return read_turns(row, TurnsMapping(column=column))
    return [Message(role, require_text(value, f"column {column}"))]


def _split_shared_prompt(row: RawRow, before: Sequence[Message]) -> RankedAnswers:
    """Split two whole conversations into their common beginning, the prompt, and the answers."""
    conversations = [
        _column_messages(row, column, "assistant") for column in ("chosen", "rejected")
    ]
    same = takewhile(lambda pair: pair[0] == pair[1], zip(*conversations, strict=False))
    shared = [message for message, _ in same]
    while shared and shared[-1].role != "user":
        shared.pop()
    if not shared:
        raise MalformedRow("there is no column prompt, and chosen and rejected share no beginning")
    answers = [messages[len(shared) :] for messages in conversations]
    return RankedAnswers([*before, *shared], answers, _pair_grades(row))


def _pair_grades(row: RawRow) -> list[float]:
    """Return grades that differ by the margin of the row, or by 1."""
    if row.get("margin") in (None, ""):
        return [1.0, 0.0]
    margin = require_number(row["margin"], "column margin")
    if not margin > 0:
        raise MalformedRow("column margin must be > 0")
    return [margin, 0.0]

"""Answers of which some are better: out of the rows of preference data."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from medgpt.config.data import TurnsMapping
from medgpt.data.sources.records import Message, Origin, Preferences
from medgpt.data.sources.turns import (
    Malformed,
    Row,
    Unusable,
    cell,
    check_turns,
    kind_of,
    read_turns,
    text_of,
)

PAIR_COLUMNS = (
    ("prompt", "chosen", "rejected"),
    ("question", "chosen", "rejected"),
    ("question", "response_chosen", "response_rejected"),
)


class Ranked(NamedTuple):
    """What a row says, unchecked."""

    prompt: list[Message]
    answers: list[list[Message]]  # (K,) what follows the prompt
    grades: list[float]  # (K,)


def pair_columns(row: Row) -> tuple[str, str, str] | None:
    """The columns of prompt, better and worse answer, if the row has such."""
    return next((names for names in PAIR_COLUMNS if all(name in row for name in names)), None)


def read_pair(row: Row, before: Sequence[Message]) -> Ranked:
    """Prompt, chosen and rejected, texts or lists of messages; answers may repeat the prompt.

    `before` is what precedes the prompt: system message and history.

    Raises:
        Malformed: a column is missing or not of this form.
    """
    columns = pair_columns(row)
    if columns is None and "prompt" not in row and "chosen" in row and "rejected" in row:
        return _whole_conversations(row, before)
    names = columns or PAIR_COLUMNS[0]
    prompt = [*before, *_messages(row, names[0], "user")]
    answers = [after(prompt, _messages(row, name, "assistant")) for name in names[1:]]
    return Ranked(prompt, answers, _pair_grades(row))


def preferences(ranked: Ranked, origin: Origin) -> Preferences:
    """The record of what a row says.

    Raises:
        Malformed: the row breaks a rule; Unusable if it compares nothing.
    """
    prompt = check_turns(ranked.prompt, "the prompt", last="user")
    answers = []
    for number, answer in enumerate(ranked.answers, start=1):
        answers.append(check_turns((*prompt, *answer), f"answer {number}")[len(prompt) :])
    if len(answers) < 2:
        raise Unusable("there is only one answer")
    if len(set(answers)) < len(answers):
        raise Malformed("two answers are equal")
    if not all(map(math.isfinite, ranked.grades)):
        raise Malformed("a grade is no finite number")
    if len(set(ranked.grades)) == 1:
        raise Unusable("no answer is better than another")
    return Preferences(
        source=origin.source,
        file=origin.file,
        row=origin.row,
        prompt=prompt,
        answers=tuple(answers),
        grades=tuple(ranked.grades),
    )


def after(prompt: Sequence[Message], messages: list[Message]) -> list[Message]:
    """`messages` without the prompt, if they begin with it."""
    same = messages[: len(prompt)] == list(prompt)
    return messages[len(prompt) :] if same else messages


def number_of(value: object, what: str) -> float:
    """Raises Malformed unless it is a number, also one in digits as a CSV file has it."""
    try:
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return float(value)
    except ValueError:
        pass
    raise Malformed(f"{what} is {kind_of(value)}, must be a number")


def _messages(row: Row, column: str, role: Any) -> list[Message]:
    """A text is one message of `role`."""
    value = cell(row, column)
    if isinstance(value, list):
        return read_turns(row, TurnsMapping(column=column))
    return [Message(role, text_of(value, f"column {column}"))]


def _whole_conversations(row: Row, before: Sequence[Message]) -> Ranked:
    """Chosen and rejected are whole conversations; the prompt is what they share."""
    whole = [_messages(row, column, "assistant") for column in ("chosen", "rejected")]
    shared = _shared(*whole)
    while shared and whole[0][shared - 1].role != "user":
        shared -= 1
    if not shared:
        raise Malformed("there is no column prompt, and chosen and rejected share no beginning")
    prompt = [*before, *whole[0][:shared]]
    return Ranked(prompt, [messages[shared:] for messages in whole], _pair_grades(row))


def _shared(one: Iterable[Message], other: Iterable[Message]) -> int:
    """Messages that both begin with."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def _pair_grades(row: Row) -> list[float]:
    """The chosen answer leads by the margin, or by 1."""
    if row.get("margin") in (None, ""):
        return [1.0, 0.0]
    margin = number_of(row["margin"], "column margin")
    if not margin > 0:
        raise Malformed("column margin must be > 0")
    return [margin, 0.0]

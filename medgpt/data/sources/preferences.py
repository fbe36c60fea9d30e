"""Reads preference data: prompts with several answers of which some are better."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any, NamedTuple

from medgpt.data.sources.chat_columns import (
    chat_messages,
    column_messages,
    history_messages,
    instruction_message,
    system_message,
)
from medgpt.data.sources.records import Message, Preferences
from medgpt.data.sources.row_values import (
    MalformedRow,
    RawRow,
    UnusableRow,
    is_empty,
    json_type,
    require_list,
)
from medgpt.data.sources.turns import check_turns
from medgpt.data.sources.unused_keys import UnusedKeys

PROMPT_COLUMNS = ("prompt", "question", "query")
CHAT_COLUMNS = ("messages", "conversations")


class RankedAnswers(NamedTuple):
    """Content of a row, not yet checked."""

    prompt: list[Message]
    answers: list[list[Message]]  # (K,) what follows the prompt
    grades: list[float]  # (K,)
    labeled: bool = False  # one answer, with grade 1 if it is good and -1 if it is bad


def with_chosen_and_rejected(row: RawRow) -> RawRow:
    """Return a row of preferences with columns chosen and rejected, other rows as they are.

    OpenAI has preferred_output and non_preferred_output, ms-swift the rejected_response (or
    rejected_messages) to messages or to a query with its response.
    """
    rest = dict(row)
    if "response_chosen" in row and "response_rejected" in row:
        answers = {name: rest.pop(f"response_{name}") for name in ("chosen", "rejected")}
        return rest | answers
    if "preferred_output" in row and "non_preferred_output" in row:
        answers = {"chosen": rest.pop("preferred_output")}
        answers["rejected"] = rest.pop("non_preferred_output")
        prompt = rest.pop("input") if isinstance(row.get("input"), dict) else {}
        return rest | prompt | answers
    rejected = next(
        (n for n in ("rejected_messages", "rejected_response") if not is_empty(row.get(n))), None
    )
    if rejected is None:
        return row
    worse = rest.pop(rejected)
    if "messages" not in row:
        better = {"chosen": rest.pop("response")} if "response" in row else {}
        return rest | better | {"rejected": worse}
    turns = require_list(row, "messages")
    del rest["messages"]
    if isinstance(worse, str):
        worse = [*turns[:-1], {"role": "assistant", "content": worse}]
    return rest | {"chosen": turns, "rejected": worse}


def read_pair(row: RawRow, keys: UnusedKeys) -> RankedAnswers:
    """Read a prompt, a chosen and a rejected answer, which may repeat the prompt.

    All are texts, turns or lists of turns. Without a prompt of its own, the prompt is what chosen
    and rejected begin with.

    Raises:
        MalformedRow: a column is missing or has another form.
    """
    before = system_message(row, keys) + history_messages(row, keys)
    chosen, rejected = (
        column_messages(row, name, "assistant", keys) for name in ("chosen", "rejected")
    )
    prompt = _read_prompt(row, keys)
    if not prompt:
        return _split_shared_prompt(before, chosen, rejected, _pair_grades(row, keys))
    prompt = [*before, *prompt]
    answers = [strip_prompt(prompt, answer) for answer in (chosen, rejected)]
    return RankedAnswers(prompt, answers, _pair_grades(row, keys))


def _read_prompt(row: RawRow, keys: UnusedKeys) -> list[Message]:
    """Return the messages of the prompt without system message and history, or nothing."""
    for name in PROMPT_COLUMNS:
        if name in row:
            return column_messages(row, name, "user", keys)
    if "instruction" in row:
        return [instruction_message(row, keys)]
    return next((chat_messages(row, name, keys) for name in CHAT_COLUMNS if name in row), [])


def read_labeled(messages: list[Message], label: object, column: str) -> RankedAnswers:
    """Return a conversation whose last answer is marked as good or bad."""
    good = {"true": True, "false": False}.get(str(label).lower())
    if good is None:
        raise MalformedRow(f"column {column} is {json_type(label)}, must be true or false")
    return RankedAnswers(messages[:-1], [messages[-1:]], [1.0 if good else -1.0], labeled=True)


def make_preferences(ranked: RankedAnswers, tools: str | None, **fields: Any) -> Preferences:
    """Check ranked answers and return them as a record with the fields of its origin.

    Raises:
        MalformedRow: the row breaks a rule.
        UnusableRow: the row has only one answer or equal grades.
    """
    prompt = check_turns(_unmarked(ranked.prompt), "the prompt", last_role="user")
    answers = [
        check_turns((*prompt, *answer), f"answer {number}")[len(prompt) :]
        for number, answer in enumerate(ranked.answers, start=1)
    ]
    if not all(message.learn for answer in answers for message in answer):
        raise MalformedRow("an answer has a turn that is not to be learned, but is compared whole")
    if len(answers) < 2 and not ranked.labeled:
        raise UnusableRow("there is only one answer")
    if len(set(answers)) < len(answers):
        raise MalformedRow("two answers are equal")
    if not all(map(math.isfinite, ranked.grades)):
        raise MalformedRow("a grade is no finite number")
    if len(set(ranked.grades)) == 1 and not ranked.labeled:
        raise UnusableRow("no answer is better than another")
    return Preferences(
        prompt=prompt, answers=tuple(answers), grades=tuple(ranked.grades), tools=tools, **fields
    )


def strip_prompt(prompt: Sequence[Message], messages: list[Message]) -> list[Message]:
    """Return `messages` without the prompt if they start with it."""
    same = _unmarked(messages[: len(prompt)]) == _unmarked(prompt)
    return messages[len(prompt) :] if same else messages


def _unmarked(messages: Sequence[Message]) -> list[Message]:
    """Return messages without their loss flags, which say nothing in a prompt."""
    return [replace(message, learn=True) for message in messages]


def require_number(value: object, location: str) -> float:
    """Return a number or a numeric text as float. Raises MalformedRow for anything else."""
    try:
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return float(value)
    except ValueError:
        pass
    raise MalformedRow(f"{location} is {json_type(value)}, must be a number")


def _split_shared_prompt(
    before: Sequence[Message],
    chosen: list[Message],
    rejected: list[Message],
    grades: list[float],
) -> RankedAnswers:
    """Split two whole conversations into their common beginning, the prompt, and the answers."""
    pairs = zip(_unmarked(chosen), _unmarked(rejected), strict=False)
    shared = [message for message, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    while shared and shared[-1].role not in ("user", "tool"):
        shared.pop()
    if not shared:
        raise MalformedRow("there is no column prompt, and chosen and rejected share no beginning")
    answers = [messages[len(shared) :] for messages in (chosen, rejected)]
    return RankedAnswers([*before, *shared], answers, grades)


def _pair_grades(row: RawRow, keys: UnusedKeys) -> list[float]:
    """Return grades that differ by the margin of the row, or by 1."""
    keys.use("margin")
    if is_empty(row.get("margin")):
        return [1.0, 0.0]
    margin = require_number(row["margin"], "column margin")
    if not margin > 0:
        raise MalformedRow("column margin must be > 0")
    return [margin, 0.0]

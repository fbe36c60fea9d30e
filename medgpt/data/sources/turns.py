"""Messages of a conversation out of a row, whatever its keys, and the rules they must keep."""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from medgpt.config.data import TurnsMapping
from medgpt.data.sources.clean import clean
from medgpt.data.sources.records import Message, Role

Row = dict[str, Any]


class Malformed(Exception):
    """A row that cannot be trained on. The message names columns and rules, never values."""


class Unusable(Malformed):
    """A good row with nothing to learn from."""


def kind_of(value: object) -> str:
    """The JSON type of `value` in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def text_of(value: object, what: str) -> str:
    """Cleaned text, not empty."""
    if not isinstance(value, str):
        raise Malformed(f"{what} is {kind_of(value)}, must be text")
    text = clean(value)
    if not text:
        raise Malformed(f"{what} is empty")
    return text


def cell(row: Row, column: str) -> Any:
    if column not in row:
        raise Malformed(f"column {column} is missing")
    return row[column]


def list_of(row: Row, column: str) -> list[Any]:
    """The list in a column; a CSV cell holds it as JSON."""
    value = cell(row, column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Malformed(f"column {column} is text that is not JSON, must be a list") from None
    if not isinstance(value, list):
        raise Malformed(f"column {column} is {kind_of(value)}, must be a list")
    if not value:
        raise Malformed(f"column {column} is empty")
    return value


def read_turns(row: Row, turns: TurnsMapping) -> list[Message]:
    """The messages in `turns.column`, joined as it says."""
    messages: list[Message] = []
    for number, turn in enumerate(list_of(row, turns.column), start=1):
        what = f"column {turns.column}, turn {number}"
        if turns.pairs:
            question, answer = (_part(turn, key, what) for key in turns.pairs)
            messages.append(Message("user", text_of(question, f"{what}, {turns.pairs[0]}")))
            messages.append(Message("assistant", text_of(answer, f"{what}, {turns.pairs[1]}")))
            continue
        role = _role(_part(turn, turns.role, what), turns, what)
        content = _part(turn, turns.content, what)
        if turns.merge and isinstance(content, str) and not clean(content):
            continue  # an empty utterance adds nothing to the speaker's others
        messages.append(Message(role, text_of(content, what)))
    return merge(messages) if turns.merge else messages


def _part(turn: object, key: str | int, what: str) -> object:
    if isinstance(key, str) and isinstance(turn, dict):
        if key not in turn:
            raise Malformed(f"{what} lacks {key}")
        return turn[key]
    if isinstance(key, int) and isinstance(turn, (list, tuple)):
        if not -len(turn) <= key < len(turn):
            raise Malformed(f"{what} has {len(turn)} items, none at {key}")
        return turn[key]
    raise Malformed(
        f"{what} is {kind_of(turn)}, must be {'an object' if isinstance(key, str) else 'a list'}"
    )


def _role(speaker: object, turns: TurnsMapping, what: str) -> Role:
    if speaker in turns.user:
        return "user"
    if speaker in turns.assistant:
        return "assistant"
    if speaker in turns.system:
        return "system"
    known = ", ".join((*turns.user, *turns.assistant, *turns.system))
    raise Malformed(f"{what} has a speaker who is none of {known}")


def merge(messages: Sequence[Message]) -> list[Message]:
    """Consecutive messages of one speaker become one, on lines of its own."""
    merged: list[Message] = []
    for message in messages:
        if merged and merged[-1].role == message.role:
            joined = f"{merged[-1].content}\n{message.content}"
            merged[-1] = Message(message.role, joined)
        else:
            merged.append(message)
    return merged


def trim(messages: Sequence[Message], what: str) -> list[Message]:
    """Without the assistant's turns before the first question, the user's after the last answer."""
    system = [m for m in messages if m.role == "system"]
    rest = [m for m in messages if m.role != "system"]
    while rest and rest[0].role == "assistant":
        rest = rest[1:]
    while rest and rest[-1].role == "user":
        rest = rest[:-1]
    if not rest:
        raise Malformed(f"{what} has no question with an answer")
    return [*system, *rest]


def check_turns(
    messages: Sequence[Message], what: str, *, last: Role = "assistant"
) -> tuple[Message, ...]:
    """An optional system message, then user and assistant in turn, ending with `last`."""
    spoken = [m for m in messages if m.role != "system"]
    if any(message.role == "system" for message in messages[1:]):
        raise Malformed(f"{what} has a system message that is not the first")
    if not spoken:
        raise Malformed(f"{what} has no turns of user and assistant")
    if spoken[0].role != "user":
        raise Malformed(f"{what} starts with the assistant, must start with the user")
    for number, (one, two) in enumerate(pairwise(spoken), start=1):
        if one.role == two.role:
            raise Malformed(
                f"{what}: turns {number} and {number + 1} have one speaker, must alternate"
            )
    if spoken[-1].role != last:
        raise Malformed(f"{what} ends with the {spoken[-1].role}, must end with the {last}")
    return tuple(messages)

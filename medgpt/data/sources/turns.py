"""Reads the messages of a conversation from a row with any keys, and checks their order."""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from medgpt.config.data import TurnsMapping
from medgpt.data.sources.clean import clean_text
from medgpt.data.sources.records import Message, Role

RawRow = dict[str, Any]


class MalformedRow(Exception):
    """The row cannot be trained on. The message names columns and rules, never values."""


class UnusableRow(MalformedRow):
    """The row is valid but has nothing to learn from."""


def json_type(value: object) -> str:
    """Return the JSON type of `value` in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def require_text(value: object, location: str) -> str:
    """Return the cleaned text. Raises MalformedRow if it is empty or not a text."""
    if not isinstance(value, str):
        raise MalformedRow(f"{location} is {json_type(value)}, must be text")
    text = clean_text(value)
    if not text:
        raise MalformedRow(f"{location} is empty")
    return text


def require_column(row: RawRow, column: str) -> Any:
    if column not in row:
        raise MalformedRow(f"column {column} is missing")
    return row[column]


def require_list(row: RawRow, column: str) -> list[Any]:
    """Return the list in a column, or raise MalformedRow. A CSV cell holds it as JSON."""
    value = require_column(row, column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise MalformedRow(
                f"column {column} is text that is not JSON, must be a list"
            ) from None
    if not isinstance(value, list):
        raise MalformedRow(f"column {column} is {json_type(value)}, must be a list")
    if not value:
        raise MalformedRow(f"column {column} is empty")
    return value


def read_turns(row: RawRow, turns: TurnsMapping) -> list[Message]:
    """Return the messages in `turns.column`, merged if `turns.merge` is set."""
    messages: list[Message] = []
    for number, turn in enumerate(require_list(row, turns.column), start=1):
        location = f"column {turns.column}, turn {number}"
        if turns.pairs:
            question, answer = (_turn_item(turn, key, location) for key in turns.pairs)
            messages.append(
                Message("user", require_text(question, f"{location}, {turns.pairs[0]}"))
            )
            messages.append(
                Message("assistant", require_text(answer, f"{location}, {turns.pairs[1]}"))
            )
            continue
        role = _turn_role(_turn_item(turn, turns.role, location), turns, location)
        content = _turn_item(turn, turns.content, location)
        if turns.merge and isinstance(content, str) and not clean_text(content):
            continue  # an empty utterance adds nothing to the merged message
        messages.append(Message(role, require_text(content, location)))
    return merge_consecutive(messages) if turns.merge else messages


def _turn_item(turn: object, key: str | int, location: str) -> object:
    if isinstance(key, str) and isinstance(turn, dict):
        if key not in turn:
            raise MalformedRow(f"{location} lacks {key}")
        return turn[key]
    if isinstance(key, int) and isinstance(turn, (list, tuple)):
        if not -len(turn) <= key < len(turn):
            raise MalformedRow(f"{location} has {len(turn)} items, none at {key}")
        return turn[key]
    expected = "an object" if isinstance(key, str) else "a list"
    raise MalformedRow(f"{location} is {json_type(turn)}, must be {expected}")


def _turn_role(speaker: object, turns: TurnsMapping, location: str) -> Role:
    if speaker in turns.user:
        return "user"
    if speaker in turns.assistant:
        return "assistant"
    if speaker in turns.system:
        return "system"
    known = ", ".join((*turns.user, *turns.assistant, *turns.system))
    raise MalformedRow(f"{location} has a speaker who is none of {known}")


def merge_consecutive(messages: Sequence[Message]) -> list[Message]:
    """Join consecutive messages of one speaker with line breaks."""
    merged: list[Message] = []
    for message in messages:
        if merged and merged[-1].role == message.role:
            joined = f"{merged[-1].content}\n{message.content}"
            merged[-1] = Message(message.role, joined)
        else:
            merged.append(message)
    return merged


def trim_unanswered(messages: Sequence[Message], location: str) -> list[Message]:
    """Remove assistant turns before the first question and user turns after the last answer."""
    system = [m for m in messages if m.role == "system"]
    turns = [m for m in messages if m.role != "system"]
    while turns and turns[0].role == "assistant":
        turns = turns[1:]
    while turns and turns[-1].role == "user":
        turns = turns[:-1]
    if not turns:
        raise MalformedRow(f"{location} has no question with an answer")
    return [*system, *turns]


def may_follow(turn: Message, next_turn: Message) -> bool:
    """Whether `next_turn` may come after `turn`: user and assistant alternate, and a call of tools
    is followed by their results and then by the assistant."""
    match turn:
        case Message(role="user" | "tool") if next_turn.role == "assistant":
            return True
        case Message(role="assistant", tool_calls=None):
            return next_turn.role == "user"
        case Message(role="assistant" | "tool"):
            return next_turn.role == "tool"
    return False


def check_turns(
    messages: Sequence[Message], location: str, *, last_role: Role = "assistant"
) -> tuple[Message, ...]:
    """Return the messages if their order is that of a Conversation.

    Raises MalformedRow unless the first turn is the user's and the last one is by `last_role`; a
    prompt (`last_role="user"`) may end with the result of a tool, too.
    """
    turns = [m for m in messages if m.role != "system"]
    if any(message.role == "system" for message in messages[1:]):
        raise MalformedRow(f"{location} has a system message that is not the first")
    if not turns:
        raise MalformedRow(f"{location} has no turns of user and assistant")
    if turns[0].role != "user":
        raise MalformedRow(f"{location} starts with the {turns[0].role}, must start with the user")
    for number, (turn, next_turn) in enumerate(pairwise(turns), start=1):
        if may_follow(turn, next_turn):
            continue
        pair = f"{location}: turns {number} and {number + 1}"
        if turn.role == next_turn.role:
            raise MalformedRow(f"{pair} have one speaker, must alternate")
        calls = " with a call" if turn.tool_calls else ""
        raise MalformedRow(f"{pair}: a {next_turn.role} after the {turn.role}{calls}")
    if turns[-1].role != last_role and (last_role, turns[-1].role) != ("user", "tool"):
        raise MalformedRow(
            f"{location} ends with the {turns[-1].role}, must end with the {last_role}"
        )
    return tuple(messages)

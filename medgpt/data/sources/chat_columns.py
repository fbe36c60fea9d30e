"""Reads the columns of known shapes that hold messages."""

from collections.abc import Sequence
from typing import Any

from medgpt.config.data import TurnsMapping
from medgpt.data.sources.clean import clean_text
from medgpt.data.sources.records import Message, Role
from medgpt.data.sources.row_values import (
    MalformedRow,
    RawRow,
    is_empty,
    require_column,
    require_list,
    require_text,
)
from medgpt.data.sources.turns import read_turns
from medgpt.data.sources.unused_keys import UnusedKeys

SYSTEM_SPEAKERS = ("system", "developer")
SHAREGPT = TurnsMapping(column="", role="from", content="value", system=SYSTEM_SPEAKERS)
MESSAGES = TurnsMapping(column="", system=SYSTEM_SPEAKERS)


def chat_messages(row: RawRow, column: str, keys: UnusedKeys) -> list[Message]:
    """Return the turns in a column, {"role", "content"} or {"from", "value"}."""
    keys.use(column)
    return _read_list(require_list(row, column), column, keys)


def column_messages(row: RawRow, column: str, role: Role, keys: UnusedKeys) -> list[Message]:
    """Return the messages in a column: a text of `role`, a turn, or a list of turns."""
    value = require_column(row, column)
    keys.use(column)
    turns = [value] if isinstance(value, dict) else value
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
        return _read_list(turns, column, keys)
    return [Message(role, require_text(value, f"column {column}"))]


def _read_list(turns: Sequence[Any], column: str, keys: UnusedKeys) -> list[Message]:
    is_sharegpt = any(isinstance(turn, dict) and "from" in turn for turn in turns)
    return read_turns(turns, SHAREGPT if is_sharegpt else MESSAGES, f"column {column}", keys)


def system_message(row: RawRow, keys: UnusedKeys) -> list[Message]:
    """Return the system message in column `system`, which many datasets have, often empty."""
    keys.use("system")
    if is_empty(row.get("system")):
        return []
    return [Message("system", require_text(row["system"], "column system"))]


def instruction_message(row: RawRow, keys: UnusedKeys) -> Message:
    """Return the question in `instruction`, with a non-empty `input` on the next line."""
    keys.use("instruction", "input")
    parts = [require_column(row, "instruction"), row.get("input")]
    for part, column in zip(parts, ("instruction", "input"), strict=True):
        if part is not None and not isinstance(part, str):
            require_text(part, f"column {column}")
    question = "\n".join(text for part in parts if part and (text := clean_text(part)))
    return Message("user", require_text(question, "column instruction"))


def history_messages(row: RawRow, keys: UnusedKeys) -> list[Message]:
    """Return the earlier turns in `history`: [question, answer] pairs, possibly as JSON text."""
    keys.use("history")
    if is_empty(row.get("history")):
        return []
    messages: list[Message] = []
    for number, pair in enumerate(require_list(row, "history"), start=1):
        location = f"column history, turn {number}"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise MalformedRow(f"{location} must be a question and an answer")
        messages.append(Message("user", require_text(pair[0], f"{location}, question")))
        messages.append(Message("assistant", require_text(pair[1], f"{location}, answer")))
    return messages

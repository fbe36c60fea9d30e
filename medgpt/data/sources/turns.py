"""Reads the messages of a conversation from a row with any keys, and checks their order."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from medgpt.config.data import TurnsMapping
from medgpt.data.sources.clean import clean_text
from medgpt.data.sources.loss_flags import LOSS_KEYS, read_loss_flag
from medgpt.data.sources.records import Message, Role
from medgpt.data.sources.row_values import MalformedRow, is_empty, json_type, require_text
from medgpt.data.sources.tools import (
    CALL_KEYS,
    CALL_SPEAKERS,
    RESULT_KEYS,
    RESULT_SPEAKERS,
    ToolCall,
    Turn,
    calls_to_json,
    order_results,
    read_calls,
    split_call_text,
)
from medgpt.data.sources.unused_keys import UnusedKeys

THOUGHT_KEY = "reasoning_content"
TEXT_PARTS = ("text", "input_text", "output_text")


def read_turns(
    turns: Sequence[object], mapping: TurnsMapping, location: str, keys: UnusedKeys
) -> list[Message]:
    """Return the messages of a list of turns, merged if `mapping.merge` is set.

    `keys` refuses or counts the keys of turns that are not read. Raises MalformedRow.
    """
    read: list[Turn] = []
    for number, item in enumerate(turns, start=1):
        where = f"{location}, turn {number}"
        turn = keys.drop_ignored(item, "turn key") if isinstance(item, dict) else item
        if mapping.pairs:
            read += _read_exchange(turn, mapping.pairs, where, keys)
        else:
            read += _read_turn(turn, mapping, where, keys)
    messages = order_results(_join_calls(read, location), location)
    return merge_consecutive(messages, location) if mapping.merge else messages


def _read_exchange(
    turn: object, pairs: tuple[str, str], location: str, keys: UnusedKeys
) -> list[Turn]:
    """Return the question and the answer in one turn."""
    question, answer = (
        require_text(_turn_item(turn, key, location), f"{location}, {key}") for key in pairs
    )
    assert isinstance(turn, dict)  # it has the keys
    keys.check_turn(turn, {*pairs, *LOSS_KEYS}, location)
    learn = read_loss_flag(turn, "assistant", location)
    return [Turn(Message("user", question)), Turn(Message("assistant", answer, learn))]


def _read_turn(turn: object, mapping: TurnsMapping, location: str, keys: UnusedKeys) -> list[Turn]:
    """Return the turn as the only item; nothing if it is empty and merged, or a system turn."""
    speaker = _turn_item(turn, mapping.role, location)
    role = _turn_role(speaker, mapping, location)
    fields: Mapping[str, Any] = turn if isinstance(turn, dict) else {}
    used = {mapping.role, mapping.content, *LOSS_KEYS}
    calls: Sequence[ToolCall] = ()
    key = next((key for key in CALL_KEYS if not is_empty(fields.get(key))), None)
    if role == "assistant" and key is not None:
        used.add(key)
        calls = read_calls(fields[key], f"{location}, {key}")
        content = fields.get(str(mapping.content)) or ""
    else:
        content = _turn_item(turn, mapping.content, location)
        if speaker in CALL_SPEAKERS:
            thought, call = split_call_text(content) if isinstance(content, str) else ("", content)
            calls, content = read_calls(call, location), thought
    text = _read_text(content, location, keys)
    if role == "assistant" and not is_empty(fields.get(THOUGHT_KEY)):
        used.add(THOUGHT_KEY)
        text = _with_thought(text, require_text(fields[THOUGHT_KEY], f"{location}, {THOUGHT_KEY}"))
    used.update(RESULT_KEYS if role == "tool" else ())
    if isinstance(turn, dict):
        keys.check_turn(turn, used, location)
    elif isinstance(turn, (list, tuple)):
        items = {i - len(turn) if i - len(turn) in used else i: x for i, x in enumerate(turn)}
        keys.check_turn(items, used, location)
    if not text and not calls and role != "tool":
        if mapping.merge or role == "system":
            return []  # it says nothing, and is merged with others or asks for nothing
        raise MalformedRow(f"{location} is empty")
    learn = read_loss_flag(fields, role, location)
    message = Message(role, text, learn, calls_to_json(calls) if calls else None)
    return [Turn(message, calls, fields.get("tool_call_id"), fields.get("name"))]


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


def _turn_role(speaker: object, mapping: TurnsMapping, location: str) -> Role:
    speakers: tuple[tuple[Role, tuple[str, ...]], ...] = (
        ("user", mapping.user),
        ("assistant", mapping.assistant),
        ("system", mapping.system),
        ("assistant", CALL_SPEAKERS),
        ("tool", RESULT_SPEAKERS),
    )
    for role, names in speakers:
        if speaker in names:
            return role
    known = ", ".join(name for _, names in speakers for name in names)
    raise MalformedRow(f"{location} has a speaker who is none of {known}")


def _read_text(content: object, location: str, keys: UnusedKeys) -> str:
    """Return the cleaned text of a turn, possibly empty: a text, or a list of parts with texts."""
    if not isinstance(content, list):
        if not isinstance(content, str):
            raise MalformedRow(f"{location} is {json_type(content)}, must be text")
        return clean_text(content)
    texts = []
    for number, item in enumerate(content, start=1):
        where = f"{location}, part {number}"
        if isinstance(item, str):
            texts.append(clean_text(item))
            continue
        if not isinstance(item, dict):
            raise MalformedRow(f"{where} is {json_type(item)}, must be an object or text")
        kind = item.get("type") or "text"
        if keys.is_ignored(kind):
            keys.names.add(f"part {kind}")
            continue
        if kind not in TEXT_PARTS:
            raise MalformedRow(f"{where} is no text, must be of type text")
        part = keys.drop_ignored(item, "part key")
        text = part.get("text")
        if not isinstance(text, str):
            raise MalformedRow(f"{where}, text is {json_type(text)}, must be text")
        keys.check_turn(part, {"type", "text"}, where)
        texts.append(clean_text(text))
    return "\n".join(text for text in texts if text)


def _with_thought(text: str, thought: str) -> str:
    return f"<think>\n{thought}\n</think>\n\n{text}".strip()


def _join_calls(turns: Sequence[Turn], location: str) -> list[Turn]:
    """Join what the assistant says with the tool calls that follow, as one message."""
    joined: list[Turn] = []
    for turn in turns:
        last = joined[-1] if joined else None
        if not turn.calls or last is None or last.message.role != "assistant":
            joined.append(turn)
            continue
        calls = (*last.calls, *turn.calls)
        message = _join(last.message, turn.message, location)
        joined[-1] = Turn(replace(message, tool_calls=calls_to_json(calls)), calls)
    return joined


def merge_consecutive(messages: Sequence[Message], location: str) -> list[Message]:
    """Join consecutive messages of one speaker with line breaks."""
    merged: list[Message] = []
    for message in messages:
        last = merged[-1] if merged else None
        if last and last.role == message.role != "tool" and last.tool_calls is None:
            merged[-1] = _join(last, message, location)
        else:
            merged.append(message)
    return merged


def _join(first: Message, second: Message, location: str) -> Message:
    if first.learn != second.learn:
        raise MalformedRow(f"{location} has turns to join of which only one is to be learned")
    content = "\n".join(text for text in (first.content, second.content) if text)
    return replace(second, content=content)


def trim_unanswered(messages: Sequence[Message], location: str) -> list[Message]:
    """Remove turns before the first question and after the last answer."""
    system = [m for m in messages if m.role == "system"]
    turns = [m for m in messages if m.role != "system"]
    while turns and turns[0].role != "user":
        turns = turns[1:]
    while turns and turns[-1].role != "assistant":
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

"""Reads tools, tool calls and their results in the forms of OpenAI, ShareGPT and LLaMA-Factory."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from medgpt.data.sources.clean import clean_text
from medgpt.data.sources.records import Message
from medgpt.data.sources.row_values import (
    MalformedRow,
    RawRow,
    is_empty,
    json_type,
    parse_json,
    shown_name,
)

TOOL_COLUMNS = ("tools", "functions")
CALL_SPEAKERS = ("function_call", "tool_call")
"""Speakers of turns whose content is a tool call as JSON, or a list of them."""
RESULT_SPEAKERS = ("tool", "observation", "function", "tool_response", "tool_result", "ipython")
"""Speakers of turns that hold what a tool returned."""
CALL_KEYS = ("tool_calls", "function_call")
RESULT_KEYS = ("tool_call_id", "name")
KNOWN_KEYS = ("name", "arguments", "parameters", "id", "type", "index", "function")
"""Keys of a tool call."""
THOUGHT_END = "</think>"


class ToolCall(NamedTuple):
    name: str
    arguments: dict[str, Any]
    id: str | None  # joins the call to its result


class Turn(NamedTuple):
    """A message and what joins its tool calls to the results."""

    message: Message
    calls: Sequence[ToolCall] = ()
    call_id: object = None  # of the call that a result answers
    call_name: object = None  # of the tool that returned the result


def read_tools(row: RawRow) -> str | None:
    """Return the tools of a row as JSON in OpenAI's form, or None if it has none."""
    column = next((name for name in TOOL_COLUMNS if not is_empty(row.get(name))), None)
    if column is None:
        return None
    location = f"column {column}"
    value = row[column]
    if isinstance(value, str):
        value = parse_json(value, location, "must be a list of tools")
    items = value if isinstance(value, list) else [value]
    return _to_json([_read_tool(item, f"{location}, tool {n}") for n, item in enumerate(items, 1)])


def _read_tool(tool: Any, location: str) -> dict[str, Any]:
    if isinstance(tool, str):
        tool = parse_json(tool, location, "must be an object")
    function = tool.get("function", tool) if isinstance(tool, dict) else tool
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise MalformedRow(f"{location} is no function with a name")
    if function is tool:  # flat: the type is that of the tool
        function = {key: value for key, value in function.items() if key != "type"}
    return {"type": "function", "function": _tidy(function)}


def read_calls(value: object, location: str) -> list[ToolCall]:
    """Return tool calls: one or a list, as JSON text or not, flat or in OpenAI's form."""
    if isinstance(value, str):
        value = parse_json(value, location, "must be a tool call")
    items = value if isinstance(value, list) else [value]
    if not items:
        raise MalformedRow(f"{location} has no tool call")
    return [_read_call(item, f"{location}, call {n}") for n, item in enumerate(items, 1)]


def _read_call(call: Any, location: str) -> ToolCall:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise MalformedRow(f"{location} is no object with name and arguments")
    for key, value in {**call, **function}.items():
        if key not in KNOWN_KEYS and not is_empty(value):
            raise MalformedRow(f"{location} has the unknown key {shown_name(key)}")
    key = "arguments" if "arguments" in function else "parameters"
    arguments = function.get(key)
    if isinstance(arguments, str) and arguments.strip():
        arguments = parse_json(arguments, f"{location}, {key}", "must be an object")
    else:
        arguments = {} if is_empty(arguments) else _tidy(arguments)
    if not isinstance(arguments, dict):
        raise MalformedRow(f"{location}, {key} is {json_type(arguments)}, must be an object")
    return ToolCall(function["name"], arguments, call.get("id"))


def calls_to_json(calls: Sequence[ToolCall]) -> str:
    """Return calls as in `Message.tool_calls`."""
    return _to_json([{"name": call.name, "arguments": call.arguments} for call in calls])


def split_call_text(text: str) -> tuple[str, str]:
    """Return the thought before a tool call in a text, possibly empty, and the call."""
    thought, end, call = text.rpartition(THOUGHT_END)
    return clean_text(thought + end), call


def order_results(turns: Sequence[Turn], location: str) -> list[Message]:
    """Return the messages, the results of several calls in the order of the calls.

    Raises MalformedRow if results belong to no call, or a call with an id has no result.
    """
    messages: list[Message] = []
    position = 0
    while position < len(turns):
        turn = turns[position]
        messages.append(turn.message)
        position += 1
        results = []
        while turn.calls and position < len(turns) and turns[position].message.role == "tool":
            results.append(turns[position])
            position += 1
        messages += _match_results(turn.calls, results, location) if results else []
    return messages


def _match_results(
    calls: Sequence[ToolCall], results: Sequence[Turn], location: str
) -> list[Message]:
    names = {call.name for call in calls}
    if any(result.call_name is not None and result.call_name not in names for result in results):
        raise MalformedRow(f"{location} has the result of a tool that was not called")
    call_ids = [call.id for call in calls]
    result_ids = [result.call_id for result in results]
    if None not in call_ids and None not in result_ids:
        if len(set(call_ids)) < len(calls) or sorted(map(str, call_ids)) != sorted(
            map(str, result_ids)
        ):
            raise MalformedRow(f"{location} has tool calls and results with other ids")
        return [results[result_ids.index(call_id)].message for call_id in call_ids]
    # one turn may hold the results of all calls
    if len(results) not in (1, len(calls)):
        raise MalformedRow(f"{location} has {len(calls)} tool calls with {len(results)} results")
    return [result.message for result in results]


def _tidy(value: Any) -> Any:
    """Return a JSON value with clean texts, without the nulls that Parquet writes for keys that
    other rows have."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, list):
        return [_tidy(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _tidy(item) for key, item in value.items() if item is not None}
    return value


def _to_json(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
    return text.encode("utf-8", "replace").decode()  # JSON may spell out half a character

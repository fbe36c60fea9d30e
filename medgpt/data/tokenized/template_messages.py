"""Messages as the dicts that chat templates take: thoughts, tool calls and results of tools."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from medgpt.data.sources.records import Message
from medgpt.data.tokenized.thoughts import split_thought

PROBE_TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": "find_dose",
                "description": "Return the dose of a drug.",
                "parameters": {
                    "type": "object",
                    "properties": {"drug": {"type": "string", "description": "its name"}},
                    "required": ["drug"],
                },
            },
        }
    ]
)
PROBE_CALL = (
    Message("user", "How much ibuprofen?"),
    Message(
        "assistant", "", tool_calls='[{"name": "find_dose", "arguments": {"drug": "ibuprofen"}}]'
    ),
    Message("tool", "400 mg"),
)
"""A question, a call and its result, to probe a template with."""
_CALL_TEXTS = ("find_dose", "ibuprofen", "400 mg")


class CallStyle(NamedTuple):
    """How a template takes a message that calls tools."""

    omit_empty: bool = False  # no content instead of an empty text
    arguments_as_json: bool = False  # a text instead of an object


DEFAULT_STYLE = CallStyle()


def as_dicts(
    messages: Sequence[Message], template: str, style: CallStyle = DEFAULT_STYLE
) -> list[dict[str, Any]]:
    """Return the messages as the template takes them.

    A thought is a key of its own where the template has one, else a part of the content.
    """
    keys = [key for key in ("reasoning_content", "thinking") if f"message.{key}" in template]
    if "m.reasoning_content" in template:
        keys = ["reasoning_content"]
    dicts: list[dict[str, Any]] = []
    open_calls: list[dict[str, Any]] = []  # whose results follow
    for message in messages:
        # strip: a newline at the start of an answer would merge with the one before it
        item: dict[str, Any] = {"role": message.role, "content": message.content.strip()}
        thought, answer = split_thought(message.content)
        if keys and thought and message.role == "assistant":
            item |= {"content": answer, keys[0]: thought}
        if message.tool_calls:
            item["tool_calls"] = _calls(message.tool_calls, len(dicts), style)
            open_calls = list(item["tool_calls"])
            if style.omit_empty and not item["content"]:
                del item["content"]
        if message.role == "tool" and open_calls:
            call = open_calls.pop(0)
            item |= {"tool_call_id": call["id"], "name": call["function"]["name"]}
        dicts.append(item)
    return dicts


def _calls(text: str, number: int, style: CallStyle) -> list[dict[str, Any]]:
    """Return the calls of a message in OpenAI's form. Mistral wants ids of nine characters."""
    calls = []
    for i, call in enumerate(json.loads(text)):
        function = {"name": call["name"], "arguments": call["arguments"]}
        if style.arguments_as_json:
            function["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
        calls.append({"id": f"c{number:04d}{i:04d}", "type": "function", "function": function})
    return calls


@lru_cache(maxsize=8)
def find_call_style(template: str, special_tokens: tuple[tuple[str, str], ...]) -> CallStyle | None:
    """Find out with a probe how the template takes calls of tools; None if it renders none."""
    for omit_empty in (False, True):
        for arguments_as_json in (False, True):
            style = CallStyle(omit_empty, arguments_as_json)
            try:
                text = render_jinja_template(
                    conversations=[as_dicts(PROBE_CALL, template, style)],
                    tools=json.loads(PROBE_TOOLS),
                    chat_template=template,
                    add_generation_prompt=True,
                    **cast(Any, dict(special_tokens)),
                )[0][0]
            except (TemplateError, TypeError):  # such as text + object
                continue
            calls = text[text.rindex(PROBE_CALL[0].content) :]
            if all(said in calls for said in _CALL_TEXTS) and '\\"' not in calls:
                return style
    return None

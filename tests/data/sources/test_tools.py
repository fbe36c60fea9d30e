"""Tools, calls and results become the same record from every form of data set."""

import json
from typing import Any

import pytest

from medgpt.data.sources.records import Message
from tests.data.sources.rows import conversation, preferences, reject

FUNCTION = {"name": "dose", "description": "剂量", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": FUNCTION}]
ARGUMENTS = {"drug": "布洛芬", "kg": 20}
CALL = {"name": "dose", "arguments": ARGUMENTS}
QUESTION, RESULT, ANSWER = "孩子20公斤吃多少？", '{"mg": 200}', "每次200毫克。"
MESSAGES = (
    Message("user", QUESTION),
    Message("assistant", "", tool_calls='[{"name":"dose","arguments":{"drug":"布洛芬","kg":20}}]'),
    Message("tool", RESULT),
    Message("assistant", ANSWER),
)


def openai(calls: list[dict[str, Any]], results: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "tools": TOOLS,
        "messages": [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": None, "tool_calls": calls},
            *[{"role": "tool", "content": RESULT, **result} for result in results],
            {"role": "assistant", "content": ANSWER},
        ],
    }


def openai_call(call_id: str | None = "call_1", **function: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": CALL | function}


TEXT = json.dumps(CALL, ensure_ascii=False)
ARGUMENTS_TEXT = json.dumps(ARGUMENTS, ensure_ascii=False)
ROWS = {
    "openai": openai([openai_call(arguments=ARGUMENTS_TEXT)], [{"tool_call_id": "call_1"}]),
    "openai, arguments as an object": openai([openai_call(None)], [{"name": "dose"}]),
    "openai, before tools": {
        "functions": [FUNCTION],
        "messages": [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": None, "function_call": CALL},
            {"role": "function", "name": "dose", "content": RESULT},
            {"role": "assistant", "content": ANSWER},
        ],
    },
    "sharegpt and llama-factory": {
        "conversations": [
            {"from": "human", "value": QUESTION},
            {"from": "function_call", "value": TEXT},
            {"from": "observation", "value": RESULT},
            {"from": "gpt", "value": ANSWER},
        ],
        "tools": json.dumps([FUNCTION], ensure_ascii=False),
    },
    "ms-swift": {
        "tools": json.dumps(TOOLS, ensure_ascii=False),
        "messages": [
            {"role": "user", "content": QUESTION},
            {"role": "tool_call", "content": TEXT},
            {"role": "tool_response", "content": RESULT},
            {"role": "assistant", "content": ANSWER},
        ],
    },
}


@pytest.mark.parametrize("form", ROWS)
def test_all_forms_make_one_record(form: str) -> None:
    item = conversation(ROWS[form])
    assert item.messages == MESSAGES
    assert item.tools is not None
    assert json.loads(item.tools) == TOOLS
    assert item.unused == ()


def test_turns_of_a_mapping_may_call_tools() -> None:
    row = {"talk": ROWS["openai"]["messages"], "functions": [FUNCTION]}
    item = conversation(row, mapping={"turns": {"column": "talk"}})
    assert item.messages == MESSAGES
    assert item.tools is not None


def test_tools_of_other_rows_are_kept() -> None:
    row = {"instruction": QUESTION, "output": ANSWER, "tools": TOOLS}
    assert conversation(row).tools == conversation(ROWS["openai"]).tools
    assert conversation(row | {"tools": "[]"}).tools is None
    assert preferences({"prompt": "q", "chosen": "a", "rejected": "b", "tools": TOOLS}).tools


def test_a_call_may_be_the_answer_and_follow_a_text_or_a_thought() -> None:
    for turns in (
        [{"from": "gpt", "value": "Let me see."}, {"from": "function_call", "value": TEXT}],
        [{"from": "function_call", "value": f"<think>Let me see.</think>\n{TEXT}"}],
    ):
        row = {"conversations": [{"from": "human", "value": QUESTION}, *turns]}
        _, call = conversation(row).messages
        assert "Let me see." in call.content
        assert call.tool_calls == MESSAGES[1].tool_calls


def test_results_come_in_the_order_of_their_calls() -> None:
    calls = [openai_call("a"), openai_call("b")]
    results = [{"tool_call_id": "b", "content": "second"}, {"tool_call_id": "a", "content": "1st"}]
    messages = conversation(openai(calls, results)).messages
    assert [m.content for m in messages if m.role == "tool"] == ["1st", "second"]
    swift = {
        "messages": [
            {"role": "user", "content": QUESTION},
            *[{"role": "tool_call", "content": TEXT}] * 2,
            *[{"role": "tool_response", "content": RESULT}] * 2,
            {"role": "assistant", "content": ANSWER},
        ]
    }
    assert [m.role for m in conversation(swift).messages[1:4]] == ["assistant", "tool", "tool"]


def test_a_text_of_arguments_is_kept_and_nulls_of_parquet_are_not() -> None:
    as_text = openai_call(arguments='{"unit": null, "kg": 20}')
    as_object = openai_call(arguments={"unit": None, "kg": 20})
    calls = [
        conversation(openai([call], [{}])).messages[1].tool_calls for call in (as_text, as_object)
    ]
    assert calls[0] is not None
    assert calls[1] is not None
    assert json.loads(calls[0])[0]["arguments"] == {"unit": None, "kg": 20}
    assert json.loads(calls[1])[0]["arguments"] == {"kg": 20}


def turn(role: str, content: object, **keys: object) -> dict[str, Any]:
    return {"role": role, "content": content, **keys}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([turn("function_call", "not JSON")], "turn 2 is text that is not JSON"),
        ([turn("function_call", "[]")], "turn 2 has no tool call"),
        ([turn("function_call", '{"arguments": {}}')], "is no object with name and arguments"),
        ([turn("function_call", '{"name": "f", "arguments": [1]}')], "arguments is a list"),
        ([turn("assistant", "x", tool_calls=[CALL | {"why": 1}])], "unknown key why"),
        ([turn("user", "x", tool_calls=[CALL])], "unknown key tool_calls"),
        ([turn("tool", "x"), turn("assistant", "y")], "turns 1 and 2: a tool after the user"),
        (
            [turn("function_call", TEXT), turn("user", "x")],
            "a user after the assistant with a call",
        ),
        ([turn("function_call", TEXT), turn("tool", "x")], "ends with the tool"),
        (
            [turn("function_call", TEXT), turn("tool", "x", name="other"), turn("assistant", "y")],
            "the result of a tool that was not called",
        ),
        (
            [turn("function_call", TEXT), *[turn("tool", "x")] * 2, turn("assistant", "y")],
            "1 tool calls with 2 results",
        ),
        (
            [
                turn("assistant", "", tool_calls=[openai_call("a")]),
                turn("tool", "x", tool_call_id="b"),
                turn("assistant", "y"),
            ],
            "tool calls and results with other ids",
        ),
    ],
)
def test_a_call_that_cannot_be_understood_is_refused(
    messages: list[dict[str, Any]], reason: str
) -> None:
    assert reason in reject({"messages": [turn("user", QUESTION), *messages]}).reason


def test_tools_that_cannot_be_understood_are_refused() -> None:
    chat = {"messages": [turn("user", "q"), turn("assistant", "a")]}
    assert "column tools is text that is not JSON" in reject(chat | {"tools": "dose(kg)"}).reason
    assert "tool 1 is no function with a name" in reject(chat | {"tools": [{"kind": 1}]}).reason

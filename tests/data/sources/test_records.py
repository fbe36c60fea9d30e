"""Messages with loss flags, tool calls and tools keep them in hashes and in the JSON of prompts."""

from medgpt.data.sources.records import (
    Conversation,
    Document,
    Message,
    Preferences,
    prompt_from_json,
    prompt_to_json,
)
from medgpt.data.tokenized.split import content_hash
from medgpt.eval.requests import Generate, fingerprint

ORIGIN = {"source": "s", "file": "f", "row": 1}
SYSTEM, QUESTION = Message("system", "你是医生"), Message("user", "头痛")
ANSWER, OTHER = Message("assistant", "休息"), Message("assistant", "x")
CALL = Message("assistant", "", tool_calls='[{"name":"dose","arguments":{"mg":5}}]')
TOOLS = '[{"type":"function","function":{"name":"dose"}}]'


def conversation(*messages: Message, tools: str | None = None) -> Conversation:
    return Conversation(messages=messages, tools=tools, **ORIGIN)


def test_records_without_further_fields_keep_the_hash_that_their_sample_ids_are_made_of() -> None:
    preferences = Preferences(
        prompt=(SYSTEM, QUESTION), answers=((ANSWER,), (OTHER,)), grades=(1.0, 0.0), **ORIGIN
    )
    hashes = map(
        content_hash,
        (Document(text="正文", **ORIGIN), conversation(SYSTEM, QUESTION, ANSWER), preferences),
    )
    assert list(hashes) == [
        "0243e23aec3263e8e2d9531dcd391579",
        "0342f051efdcdfc46864c19e8fa2dbc5",
        "0e5ca8b5414554772b2caadaffdd2081",
    ]


def test_hashes_of_evaluations_are_those_of_messages_without_further_fields() -> None:
    assert fingerprint(Generate("a", (SYSTEM, QUESTION, ANSWER), 5)) == "e2a05a7b59115851"
    assert repr(conversation(ANSWER)) == (
        "Conversation(source='s', file='f', row=1, "
        "messages=(Message(role='assistant', content='休息'),), num_trimmed=0)"
    )
    assert "learn=False" in repr(Message("assistant", "休息", learn=False))


def test_loss_flags_tool_calls_and_tools_change_the_hash() -> None:
    unlearned = Message("assistant", "休息", learn=False)
    records = [
        conversation(QUESTION, ANSWER),
        conversation(QUESTION, unlearned),
        conversation(QUESTION, ANSWER, tools=TOOLS),
        conversation(QUESTION, CALL),
        conversation(QUESTION, Message("assistant", CALL.text)),
    ]
    assert len({content_hash(record) for record in records}) == len(records)


def test_a_prompt_survives_json_with_all_fields_of_its_messages() -> None:
    messages = (SYSTEM, QUESTION, CALL, Message("tool", ""), Message("assistant", "a", learn=False))
    assert prompt_to_json((QUESTION, ANSWER)) == '[["user", "头痛"], ["assistant", "休息"]]'
    for tools in (None, TOOLS):
        restored = prompt_from_json(prompt_to_json(messages, tools))
        assert restored == {"messages": messages, "tools": tools}

"""No column and no key of a turn is dropped without a count or an error."""

from typing import Any

import pytest

from medgpt.data.sources.records import Conversation, Document, Preferences
from tests.data.sources.rows import conversation, parse_row, preferences, reject

QA = {"question": "q", "answer": "a"}
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def with_key(**keys: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "q", **keys}, CHAT["messages"][1]]}


@pytest.mark.parametrize("column", ["images", "image", "videos", "audios", "audio", "objects"])
@pytest.mark.parametrize(
    "row",
    [
        QA,
        CHAT,
        {"instruction": "q", "output": "a"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"text": "t"},
    ],
)
def test_a_column_that_the_text_refers_to_is_refused_or_counted(
    row: dict[str, Any], column: str
) -> None:
    full = row | {column: ["x.png"]}
    refused = reject(full)
    assert refused.malformed
    assert f"column {column} is not used; set ignore=['{column}']" in refused.reason
    assert "x.png" not in refused.reason

    told = parse_row(full, ignore=[column])
    assert isinstance(told, (Document, Conversation, Preferences))
    assert told.unused == (f"column {column}",)

    for empty in (None, [], "", "[]", [None], {"path": None}):
        item = parse_row(row | {column: empty})
        assert isinstance(item, (Document, Conversation, Preferences))
        assert item.unused == ()


def test_tools_of_a_document_are_refused() -> None:
    assert "column tools is not used" in reject({"text": "t", "tools": [{"name": "f"}]}).reason


def test_a_column_that_nothing_reads_is_counted() -> None:
    assert conversation(QA | {"id": 3, "source": "x", "empty": ""}).unused == (
        "column id",
        "column source",
    )
    assert preferences({"prompt": "q", "chosen": "a", "rejected": "b", "score": 1}).unused == (
        "column score",
    )
    mapping = {"user": "{{ q }}", "assistant": "{{ a }}"}
    row = {"q": "q", "a": "a", "more": 1, "x" * 40: 1}
    assert conversation(row, mapping=mapping).unused == ("column <40 characters>", "column more")
    whole_row = {"user": "{{ row['q'] }}", "assistant": "{{ a }}"}
    assert conversation(row, mapping=whole_row).unused == ()


def test_a_mapping_may_use_any_column_but_not_drop_one_with_a_meaning() -> None:
    row = {"q": "q", "a": "a", "image": "x.png"}
    mapping = {"user": "{{ q }}", "assistant": "{{ a }}"}
    assert "column image is not used" in reject(row, mapping=mapping).reason
    assert conversation(row, mapping=mapping, ignore=["image"]).unused == ("column image",)
    assert conversation(row, mapping=mapping | {"user": "{{ q }} {{ image }}"}).unused == ()


@pytest.mark.parametrize("key", ["emotion", "images", "name", "loss_span"])
def test_an_unknown_key_of_a_turn_is_refused_or_counted(key: str) -> None:
    row = with_key(**{key: "secret"})
    refused = reject(row)
    assert refused.malformed
    assert f"column messages, turn 1 has the unknown key {key}; set ignore" in refused.reason
    assert "secret" not in refused.reason
    assert conversation(row, ignore=[key]).unused == (f"turn key {key}",)
    assert conversation(with_key(**{key: None})).unused == ()


def test_a_mapping_of_turns_counts_their_other_keys() -> None:
    row = {"talk": with_key(mood="x")["messages"]}
    mapping = {"turns": {"column": "talk"}}
    assert conversation(row, mapping=mapping).unused == ("turn key mood",)
    image = {"talk": with_key(images=["x.png"])["messages"]}
    assert "unknown key images" in reject(image, mapping=mapping).reason
    by_index = {"talk": [["user", "q", 3], ["assistant", "a"]]}
    mapping = {"turns": {"column": "talk", "role": 0, "content": 1}}
    assert conversation(by_index, mapping=mapping).unused == ("turn key 2",)


def test_keys_of_graded_answers_are_counted() -> None:
    answers = [{"text": "a", "grade": 1, "by": "x"}, {"text": "b", "grade": 2}]
    mapping = {
        "user": "{{ q }}",
        "answers": {"column": "answers", "text": "{{ text }}", "grade": "{{ grade }}"},
    }
    row = {"q": "q", "answers": answers}
    assert preferences(row, mapping=mapping).unused == ("column by",)
    answers[0]["image"] = "x.png"
    assert "answer 1: column image is not used" in reject(row, mapping=mapping).reason


def test_a_content_of_parts_is_its_texts() -> None:
    parts = [{"type": "text", "text": "头痛"}, {"type": "text", "text": "三天", "image_url": None}]
    assert conversation(with_key(content=parts)).messages[0].content == "头痛\n三天"

    image = {"type": "image_url", "image_url": {"url": "x.png"}}
    assert "part 3 is no text" in reject(with_key(content=[*parts, image])).reason
    told = conversation(with_key(content=[*parts, image]), ignore=["image_url"])
    assert told.unused == ("part image_url",)
    assert "turn 1 is empty" in reject(with_key(content=[])).reason


def test_a_thought_in_a_key_of_its_own_is_kept() -> None:
    answer = {"role": "assistant", "content": "a", "reasoning_content": "because"}
    item = conversation({"messages": [CHAT["messages"][0], answer]})
    assert item.messages[1].content == "<think>\nbecause\n</think>\n\na"


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "answer": "a"},
        {"query": "q", "response": "a"},
        {"prompt": "q", "completion": "a"},
        {"instruction": "q", "output": "a"},
    ],
)
def test_system_and_history_are_read_in_every_kind_that_has_questions(row: dict[str, Any]) -> None:
    item = conversation(row | {"system": "s", "history": [["x", "y"]]})
    assert [message.content for message in item.messages] == ["s", "x", "y", "q", "a"]
    kind = "instruction" if "instruction" in row else "qa"
    assert conversation(row | {"history": [["x", "y"]]}, kind=kind).messages[0].content == "x"

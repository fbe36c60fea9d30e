"""Marks that say whether a turn is learned are obeyed, in every form that data sets have."""

from typing import Any

import pytest

from medgpt.data.sources.records import Conversation, Document
from tests.data.sources.rows import conversation, parse_row, reject

Q, A = "头痛怎么办？", "请先量血压。"


def chat(**marks: object) -> dict[str, Any]:
    """A conversation whose first answer has these marks."""
    return {
        "messages": [
            {"role": "user", "content": Q},
            {"role": "assistant", "content": "wrong", **marks},
            {"role": "user", "content": "and?"},
            {"role": "assistant", "content": A},
        ]
    }


def learned(item: Conversation) -> list[str]:
    return [m.content for m in item.messages if m.role == "assistant" and m.learn]


@pytest.mark.parametrize(
    "marks",
    [
        {"loss": False},
        {"weight": 0},
        {"weight": 0.0, "train": None},
        {"train": False},
        {"loss": False, "weight": 0, "train": False},
        {"loss_scale": 0.0},
        {"loss_mask": "false"},
    ],
)
def test_an_answer_marked_not_to_be_learned_is_context_only(marks: dict[str, Any]) -> None:
    assert learned(conversation(chat(**marks))) == [A]


@pytest.mark.parametrize(
    "marks", [{}, {"loss": True}, {"weight": 1}, {"weight": 1.0, "loss": None}]
)
def test_an_answer_without_a_mark_or_marked_to_be_learned_is_learned(marks: dict[str, Any]) -> None:
    assert learned(conversation(chat(**marks))) == ["wrong", A]


def test_marks_are_obeyed_in_every_shape_of_a_turn() -> None:
    sharegpt = {
        "conversations": [
            {"from": "system", "value": "s", "train": False},
            {"from": "human", "value": Q, "train": False},
            {"from": "gpt", "value": "wrong", "train": False},
            {"from": "human", "value": Q, "weight": 0},
            {"from": "gpt", "value": A, "train": True},
        ]
    }
    assert learned(conversation(sharegpt)) == [A]
    pairs = {"talk": [{"in": Q, "out": "wrong", "loss": False}, {"in": Q, "out": A}]}
    mapping = {"turns": {"column": "talk", "pairs": ["in", "out"]}}
    assert learned(conversation(pairs, mapping=mapping)) == [A]
    mapped = {"talk": chat(loss=False)["messages"]}
    assert learned(conversation(mapped, mapping={"turns": {"column": "talk"}})) == [A]


@pytest.mark.parametrize(
    ("marks", "reason"),
    [
        ({"weight": 0.5}, "turn 2, weight is a number, must be 0 or 1"),
        ({"weight": 2}, "turn 2, weight is a number, must be 0 or 1"),
        ({"loss": "no"}, "turn 2, loss is text, must be 0 or 1"),
        ({"loss": [1, 0]}, "turn 2, loss is a list, must be 0 or 1"),
        ({"loss": True, "weight": 0}, "turn 2: loss and weight contradict each other"),
        ({"train_detail": [{"begin_offset": 0, "train": False}]}, "unknown key train_detail"),
    ],
)
def test_a_mark_that_cannot_be_obeyed_is_refused(marks: dict[str, Any], reason: str) -> None:
    item = reject(chat(**marks))
    assert item.malformed
    assert reason in item.reason


def test_a_question_cannot_be_learned() -> None:
    row = chat()
    row["messages"][0]["loss"] = True
    assert "asks to learn a turn of the user" in reject(row).reason


def test_a_row_without_an_answer_to_learn_is_set_aside() -> None:
    row = {"messages": chat(loss=False)["messages"][:2]}
    for item in (reject(row), reject(chat() | {"loss": False}), reject(chat() | {"weight": 0})):
        assert not item.malformed
        assert "no turn of the assistant is to be learned" in item.reason
    assert "the row, weight is a number, must be 0 or 1" in reject(chat() | {"weight": 0.5}).reason
    text = {"messages": [{"role": "assistant", "content": A, "loss": False}]}
    assert not reject(text).malformed


def test_merged_utterances_must_agree() -> None:
    talk = [
        {"role": "user", "content": Q},
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "b", "loss": False},
    ]
    mapping = {"turns": {"column": "talk", "merge": True}}
    assert "only one is to be learned" in reject({"talk": talk}, mapping=mapping).reason
    talk[1]["loss"] = False
    talk += [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]
    assert learned(conversation({"talk": talk}, mapping=mapping)) == [A]


def test_an_answer_alone_is_a_document() -> None:
    item = parse_row({"messages": [{"role": "assistant", "content": f" {A}"}]})
    assert isinstance(item, Document)
    assert item.text == A

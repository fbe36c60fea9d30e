"""Rows of preference data become a prompt with graded answers, or a reject with its reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from medgpt.config.base import ConfigError
from medgpt.config.data import SourceConfig
from medgpt.config.loading import validate
from medgpt.data.sources.file_slices import list_slices
from medgpt.data.sources.readers import read_slice
from medgpt.data.sources.records import Conversation, Message, Origin, Preferences, Record, Reject
from medgpt.data.sources.row_formats import RowParser

ORIGIN = Origin(source="s", file="f.jsonl", row=7)
Q, GOOD, BAD = "头痛怎么办？", "请先量血压。", "多喝水。"
USER, BETTER, WORSE = Message("user", Q), Message("assistant", GOOD), Message("assistant", BAD)


def source(**changes: object) -> SourceConfig:
    return validate(SourceConfig, {"name": "s", "paths": ["x"], "license": "MIT", **changes})


def parse_row(row: dict[str, Any], **changes: object) -> Record | Reject:
    return RowParser(source(**changes))(row, ORIGIN)


def ranked(item: Record | Reject) -> Preferences:
    assert isinstance(item, Preferences), item
    assert (item.source, item.file, item.row) == ("s", "f.jsonl", 7)
    return item


def dicts(*messages: Message) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


@pytest.mark.parametrize(
    "row",
    [
        {"id": "1", "kind": "wrong", "prompt": Q, "chosen": GOOD, "rejected": BAD},
        {"prompt": dicts(USER), "chosen": dicts(BETTER), "rejected": dicts(WORSE)},
        {"prompt": Q, "chosen": dicts(USER, BETTER), "rejected": dicts(USER, WORSE)},
        {"chosen": dicts(USER, BETTER), "rejected": dicts(USER, WORSE), "margin": None},
        {"question": Q, "response_chosen": GOOD, "response_rejected": BAD},
        {"question": Q, "chosen": GOOD, "rejected": BAD, "answer": "another"},
    ],
)
def test_pairs_are_recognized_by_their_columns(row: dict[str, Any]) -> None:
    item = ranked(parse_row(row))
    assert item.prompt == (USER,)
    assert item.answers == ((BETTER,), (WORSE,))
    assert item.grades == (1.0, 0.0)
    assert item.messages == (USER, BETTER)


TURN = {"from": "human", "value": Q}


@pytest.mark.parametrize(
    "row",
    [
        {  # LLaMA-Factory
            "conversations": [TURN],
            "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD},
        },
        {"instruction": Q, "input": "", "chosen": GOOD, "rejected": BAD},
        {"instruction": Q, "chosen": dicts(BETTER), "rejected": dicts(WORSE)},
        {"messages": dicts(USER, BETTER), "rejected_response": BAD},  # ms-swift
        {"messages": dicts(USER, BETTER), "rejected_messages": dicts(USER, WORSE)},
        {"query": Q, "response": GOOD, "rejected_response": BAD},
        {  # OpenAI
            "input": {"messages": dicts(USER), "tools": []},
            "preferred_output": dicts(BETTER),
            "non_preferred_output": dicts(WORSE),
        },
    ],
)
def test_pairs_of_other_tools_are_recognized(row: dict[str, Any]) -> None:
    item = ranked(parse_row(row))
    assert item.prompt == (USER,)
    assert item.answers == ((BETTER,), (WORSE,))
    assert item.unused == ()


@pytest.mark.parametrize(
    ("row", "grade"),
    [
        ({"instruction": Q, "input": "", "output": GOOD, "kto_tag": True}, 1.0),
        ({"messages": dicts(USER, WORSE), "kto_tag": False}, -1.0),
        ({"messages": dicts(USER, WORSE), "label": False}, -1.0),
        ({"prompt": dicts(USER), "completion": dicts(BETTER), "label": True}, 1.0),
        ({"question": Q, "answer": BAD, "kto_tag": "false"}, -1.0),
    ],
)
def test_an_answer_with_a_label_is_a_preference_of_its_own(
    row: dict[str, Any], grade: float
) -> None:
    item = ranked(parse_row(row))
    assert item.prompt == (USER,)
    assert item.answers == ((BETTER if grade > 0 else WORSE,),)
    assert item.grades == (grade,)


def test_other_labels_are_counted_and_wrong_ones_are_malformed() -> None:
    item = parse_row({"question": Q, "answer": GOOD, "label": "cardiology"})
    assert isinstance(item, Conversation)
    assert item.unused == ("column label",)
    wrong = parse_row({"question": Q, "answer": GOOD, "kto_tag": 0.5})
    assert isinstance(wrong, Reject)
    assert "column kto_tag is a number, must be true or false" in wrong.reason


def test_loss_flags_mean_nothing_in_a_prompt_and_cannot_be_obeyed_in_an_answer() -> None:
    history = [{**turn, "weight": 0} for turn in dicts(USER, WORSE)]
    chosen = [*history, *dicts(USER, BETTER)]
    rejected = dicts(USER, WORSE, USER, Message("assistant", "x"))
    item = ranked(parse_row({"chosen": chosen, "rejected": rejected}))
    assert item.prompt == (USER, WORSE, USER)
    marked = [{**dicts(BETTER)[0], "loss": False}]
    refused = parse_row({"prompt": Q, "chosen": marked, "rejected": BAD})
    assert isinstance(refused, Reject)
    assert "an answer has a turn that is not to be learned" in refused.reason


def test_history_system_message_and_margin_of_a_pair_are_kept() -> None:
    row = {"system": "医生", "history": [["在吗", "在"]], "prompt": Q, "margin": "2.5"}
    item = ranked(parse_row(row | {"chosen": GOOD, "rejected": BAD}))
    assert [m.role for m in item.prompt] == ["system", "user", "assistant", "user"]
    assert item.grades == (2.5, 0.0)


def test_answers_in_whole_conversations_may_have_several_turns() -> None:
    more = (Message("user", "谢谢"), Message("assistant", "不客气"))
    row = {"chosen": dicts(USER, BETTER, *more), "rejected": dicts(USER, WORSE)}
    assert ranked(parse_row(row)).answers == ((BETTER, *more), (WORSE,))


ANSWERS = {"column": "candidates", "text": "{{ text }}", "grade": "{{ total }}"}


def candidates(*answers: tuple[str, Any]) -> dict[str, Any]:
    return {"q": Q, "candidates": [{"text": text, "total": total} for text, total in answers]}


def test_graded_answers_are_mapped() -> None:
    mapping = {"user": "{{ q }}", "answers": ANSWERS}
    item = ranked(parse_row(candidates((BAD, 1), (GOOD, 7.5), ("x", "1")), mapping=mapping))
    assert [answer[0].content for answer in item.answers] == [BAD, GOOD, "x"]
    assert item.grades == (1.0, 7.5, 1.0)
    assert item.messages[-1] == BETTER


def test_graded_dialogues_are_mapped_without_the_prompt_they_repeat() -> None:
    turns = {"column": "talk", "user": ["patient"], "assistant": ["doctor"]}
    talk = [{"role": "patient", "content": Q}, {"role": "doctor", "content": GOOD}]
    row = {"q": Q, "all": [{"talk": talk, "n": 2}, {"talk": talk[1:] + talk, "n": 1}]}
    answers = {"column": "all", "turns": turns, "grade": "{{ n }}"}
    item = ranked(parse_row(row, mapping={"user": "{{ q }}", "answers": answers}))
    assert item.answers == ((BETTER,), (BETTER, USER, BETTER))


def test_chosen_and_rejected_are_mapped() -> None:
    mapping = {"user": "{{ q }}", "chosen": "{{ a }}", "rejected": "{{ b }}"}
    item = ranked(parse_row({"q": Q, "a": GOOD, "b": BAD}, mapping=mapping))
    assert item.answers == ((BETTER,), (WORSE,))


PAIR = {"prompt": Q, "chosen": GOOD, "rejected": BAD}


@pytest.mark.parametrize(
    ("row", "reason", "malformed"),
    [
        (PAIR | {"rejected": GOOD}, "two answers are equal", True),
        (PAIR | {"rejected": f" {GOOD}\n"}, "two answers are equal", True),
        (PAIR | {"rejected": " "}, "kind pairs: column rejected is empty", True),
        (PAIR | {"chosen": None}, "kind pairs: column chosen is null, must be text", True),
        (PAIR | {"margin": 0}, "kind pairs: column margin must be > 0", True),
        (PAIR | {"margin": "nan"}, "kind pairs: column margin must be > 0", True),
        (PAIR | {"margin": "inf"}, "a grade is no finite number", True),
        (PAIR | {"margin": "far"}, "kind pairs: column margin is text, must be a number", True),
        (PAIR | {"prompt": dicts(USER, BETTER)}, "the prompt ends with the assistant", True),
        (PAIR | {"chosen": dicts(BETTER, BETTER)}, "answer 1: turns 2 and 3 have one", True),
        ({"chosen": GOOD, "rejected": BAD}, "share no beginning", True),
        (candidates((GOOD, 1)), "there is only one answer", False),
        (candidates((GOOD, 3), (BAD, 3)), "no answer is better than another", False),
        (candidates((GOOD, 3), (GOOD, 2)), "two answers are equal", True),
        (candidates((GOOD, 3), ("", 2)), "candidates, answer 2: mapping.answers.text is", True),
        (candidates((GOOD, 3), (BAD, "?")), "candidates, answer 2: its grade is text", True),
        ({"q": Q, "candidates": [GOOD]}, "answer 1 is text, must be an object", True),
        ({"q": Q, "candidates": []}, "column candidates is empty", True),
    ],
)
def test_incomparable_answers_are_set_aside(
    row: dict[str, Any], reason: str, malformed: bool
) -> None:
    options = {"mapping": {"user": "{{ q }}", "answers": ANSWERS}} if "q" in row else {}
    item = parse_row(row, **options)
    assert isinstance(item, Reject), item
    assert reason in item.reason
    assert item.malformed == malformed
    assert not any(text in item.reason for text in (Q, GOOD, BAD))


def test_prompts_alone_end_with_the_user() -> None:
    plain = parse_row({"prompt": Q, "system": "医生"}, kind="prompt")
    mapped = parse_row({"q": Q}, mapping={"user": "{{ q }}"})
    assert isinstance(plain, Conversation)
    assert plain.messages == (Message("system", "医生"), USER)
    assert isinstance(mapped, Conversation)
    assert mapped.messages == (USER,)


@pytest.mark.parametrize(
    "mapping",
    [
        {"user": "x", "chosen": "x"},
        {"user": "x", "assistant": "x", "chosen": "x", "rejected": "x"},
        {"text": "x", "answers": ANSWERS},
        {"user": "x", "answers": ANSWERS | {"turns": {"column": "c"}}},
    ],
)
def test_mappings_that_contradict_themselves_are_refused(mapping: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="mapping"):
        source(mapping=mapping)


def test_group_by_joins_rows_of_one_question_wherever_they_are(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "q": "一", "a": "甲", "votes": "2"},
        {"id": 2, "q": "二", "a": "乙", "votes": "0"},
        {"q": "没有"},
        {"id": 1, "q": "一", "a": "丙", "votes": "5"},
    ]
    file = tmp_path / "rows.jsonl"
    many = "".join(json.dumps(row | {"more": "x" * 1000}) + "\n" for row in rows)
    file.write_text(many * 600, "utf-8")  # over 2 MiB
    answers = {"column": "rows", "text": "{{ a }}", "grade": "{{ votes }}"}
    grouped = source(
        paths=[str(file)], group_by="id", mapping={"user": "{{ q }}", "answers": answers}
    )
    slices = list_slices(grouped, 1)
    assert len(slices) == 1
    assert len(list_slices(source(paths=[str(file)]), 1)) > 1  # no slice has all rows

    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    first, single, broken = read_slice(slices[0], grouped)

    assert isinstance(first, Preferences)
    assert (first.row, first.grades) == (1, (2.0, 5.0))
    assert isinstance(single, Reject)
    assert (single.row, single.reason) == (2, "there is only one answer")
    assert isinstance(broken, Reject)
    assert (broken.row, broken.malformed) == (3, True)
    assert broken.reason == "column id is missing, must be text or a number to group by"

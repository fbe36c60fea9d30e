from typing import Any

import pytest

from medgpt.config.base import ConfigError
from medgpt.config.data import SourceConfig
from medgpt.data.sources.clean import clean_text
from medgpt.data.sources.records import Conversation, Document, Origin, Record, Reject
from medgpt.data.sources.row_formats import RowParser

ORIGIN = Origin(source="s", file="f.jsonl", row=7)
Q, A = "头痛怎么办？", "请先量血压。"
ONE = [("user", Q), ("assistant", A)]


def parse_row(row: dict[str, Any], **changes: object) -> Record | Reject:
    values = {"name": "s", "paths": ["x"], "license": "MIT", **changes}
    return RowParser(SourceConfig.model_validate(values))(row, ORIGIN)


def turns(item: Record | Reject) -> list[tuple[str, str]]:
    assert isinstance(item, Conversation), item
    return [(m.role, m.content) for m in item.messages]


def reason(item: Record | Reject) -> str:
    assert isinstance(item, Reject), item
    assert item.malformed
    return item.reason


def test_records_and_rejects_say_where_they_come_from() -> None:
    for item in (parse_row({"text": "x"}), parse_row({"text": ""}), parse_row({"input": 1})):
        assert (item.source, item.file, item.row) == ("s", "f.jsonl", 7)


@pytest.mark.parametrize("column", ["text", "content"])
def test_text_columns_make_documents(column: str) -> None:
    item = parse_row({column: " 正文 ", "id": 3})
    assert isinstance(item, Document)
    assert item.text == "正文"


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": Q, "output": A},
        {"instruction": Q, "input": "", "output": A, "text": "joined"},
        {"instruction": "", "input": Q, "output": A, "system": None},
        {"instruction": Q, "input": None, "output": A, "history": None},
        {"instruction": Q, "output": A, "history": ""},
        {"instruction": Q, "output": A, "history": "[]"},
        {"question": Q, "answer": A},
        {"prompt": Q, "completion": A, "system": ""},
        {"query": Q, "response": A},
        {"messages": [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]},
        {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]},
        {
            "messages": [
                {"role": "system", "content": " "},
                {"role": "user", "content": Q},
                {"role": "assistant", "content": A},
            ]
        },
    ],
)
def test_known_columns_make_conversations(row: dict[str, Any]) -> None:
    assert turns(parse_row(row)) == ONE


def test_the_input_follows_the_instruction_on_its_own_line() -> None:
    item = parse_row({"instruction": "总结", "input": "病历", "output": A, "system": "你是医生"})
    assert turns(item) == [("system", "你是医生"), ("user", "总结\n病历"), ("assistant", A)]


@pytest.mark.parametrize("history", [[["一", "二"], ["三", "四"]], '[["一", "二"], ["三", "四"]]'])
def test_history_comes_before_the_exchange(history: object) -> None:
    item = parse_row({"instruction": Q, "output": A, "history": history})
    assert [text for _, text in turns(item)] == ["一", "二", "三", "四", Q, A]


def test_configured_question_and_answer_columns_are_used() -> None:
    row = {"ask": Q, "reply": A, "question": "no", "answer": "no"}
    changes = {"question_column": "ask", "answer_column": "reply"}
    assert turns(parse_row(row, **changes)) == ONE
    assert turns(parse_row(row, kind="qa", **changes)) == ONE


def test_a_list_of_turns_may_be_json_text_as_in_csv() -> None:
    text = '[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, '
    text += '{"role": "assistant", "content": "a"}]'
    assert [role for role, _ in turns(parse_row({"messages": text}))] == [
        "system",
        "user",
        "assistant",
    ]


def sharegpt_row(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": r, "content": r} for r in roles]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": ""}, "column text is empty"),
        ({"text": "\u3000\ufeff\n"}, "column text is empty"),
        ({"text": None}, "column text is null, must be text"),
        ({"text": 5}, "column text is a number, must be text"),
        ({"question": Q, "answer": ["x"]}, "column answer is a list, must be text"),
        ({"instruction": Q, "input": {"a": 1}, "output": A}, "column input is an object"),
        ({"instruction": " ", "output": A}, "column instruction is empty"),
        ({"instruction": Q, "output": True}, "column output is true or false"),
        ({"instruction": Q, "output": A, "history": [["q"]]}, "history, turn 1 must be a question"),
        ({"instruction": Q, "output": A, "history": [["q", ""]]}, "turn 1, answer is empty"),
        ({"instruction": Q, "output": A, "history": "{x"}, "history is text that is not JSON"),
        ({"messages": []}, "column messages is empty"),
        ({"messages": {"a": 1}}, "column messages is an object, must be a list"),
        ({"messages": ["x"]}, "turn 1 is text, must be an object"),
        ({"messages": [{"role": "user"}]}, "turn 1 lacks content"),
        ({"messages": [{"role": "nurse", "content": "x"}]}, "turn 1 has a speaker who is none of"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "starts with the tool"),
        ({"messages": [{"role": ["x"], "content": "x"}]}, "turn 1 has a speaker who is none of"),
        ({"messages": [{"role": "user", "content": {"text": "x"}}]}, "turn 1 is an object"),
        ({"messages": [{"role": "user", "content": [3]}]}, "turn 1, part 1 is a number"),
        (sharegpt_row("assistant", "user"), "starts with the assistant"),
        (sharegpt_row("user", "assistant", "user"), "ends with the user"),
        (sharegpt_row("user", "user", "assistant"), "turns 1 and 2 have one speaker"),
        (sharegpt_row("user", "system", "assistant"), "a system message that is not the first"),
        (
            sharegpt_row("system", "system", "user", "assistant"),
            "a system message that is not the first",
        ),
        (sharegpt_row("system"), "no turns of user and assistant"),
        ({"title": "x", "ask": "y"}, "no known shape in columns title, ask; set kind or mapping"),
        ({}, "no known shape"),
    ],
)
def test_an_unusable_row_is_rejected_with_column_and_rule(
    row: dict[str, Any], expected: str
) -> None:
    assert expected in reason(parse_row(row))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("text", "kind text: column content is missing"),
        ("instruction", "kind instruction: column instruction is missing"),
        ("history", "kind history: column instruction is missing"),
        ("messages", "kind messages: column messages is missing"),
        ("sharegpt", "kind sharegpt: column conversations is missing"),
        ("qa", "kind qa: column question is missing"),
    ],
)
def test_a_row_of_another_kind_than_configured_is_rejected(kind: str, expected: str) -> None:
    assert reason(parse_row({"something": "else"}, kind=kind)) == expected


def test_a_header_made_of_values_is_not_quoted() -> None:
    assert "<40 characters>" in reason(parse_row({"患" * 40: "x"}))


def test_templates_make_documents_and_exchanges() -> None:
    row = {"name": "流感", "signs": ["发热", "咳嗽"], "my key": "K", "n": 3}
    text = "{{ name }}：{{ signs | join('、') }}{{ row['my key'] }}{{ n }}"
    item = parse_row(row, mapping={"text": text})
    assert isinstance(item, Document)
    assert item.text == "流感：发热、咳嗽K3"
    mapping = {"system": "S", "user": "{{ name }}？", "assistant": "{{ signs[0] }}"}
    assert turns(parse_row(row, mapping=mapping)) == [
        ("system", "S"),
        ("user", "流感？"),
        ("assistant", "发热"),
    ]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ absent }}", "mapping.text: column absent is missing"),
        ("{{ a.absent }}", "mapping.text does not fit the row"),
        ("{{ a }}", "mapping.text prints an object, must print text or a number"),
        ("{{ b }}", "mapping.text prints null"),
        ("{{ c }}", "mapping.text prints a list"),
        ("{{ c | join }}", "mapping.text is empty"),
        ("{{ b | join('x') }}", "mapping.text does not fit the row (TypeError)"),
        ("{{ 1 / d }}", "mapping.text does not fit the row (ZeroDivisionError)"),
        ("{{ a.__class__.__mro__ }}", "mapping.text does not fit the row (SecurityError)"),
        ("{% set _ = c.append(1) %}x", "mapping.text does not fit the row (SecurityError)"),
    ],
)
def test_a_row_that_a_template_does_not_fit_is_rejected(template: str, expected: str) -> None:
    row = {"a": {}, "b": None, "c": [], "d": 0}
    assert reason(parse_row(row, mapping={"text": template})).startswith(expected)


def test_a_wrong_template_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"data\.sources s mapping\.text: not a Jinja template"):
        parse_row({}, mapping={"text": "{{ x "})


def chat(*utterances: str) -> dict[str, Any]:
    """d: a doctor's words, p: a patient's."""
    speakers = {"d": "医生", "p": "患者"}
    return {"chat": [{"who": speakers[u[0]], "says": u[1:]} for u in utterances]}


CHAT = {"column": "chat", "role": "who", "content": "says"}


def test_utterances_of_one_speaker_are_merged() -> None:
    row = chat("p你好", "p在吗", "d在", "d ", "d请说")
    mapping = {"turns": {**CHAT, "merge": True}}
    assert turns(parse_row(row, mapping=mapping)) == [
        ("user", "你好\n在吗"),
        ("assistant", "在\n请说"),
    ]
    assert "turns 1 and 2 have one speaker" in reason(
        parse_row(chat("p你好", "p在吗", "d在"), mapping={"turns": CHAT})
    )


def test_greetings_and_thanks_are_trimmed() -> None:
    row = chat("d您好", "p头痛", "d多久了", "p谢谢")
    assert turns(parse_row(row, mapping={"turns": {**CHAT, "trim": True}})) == [
        ("user", "头痛"),
        ("assistant", "多久了"),
    ]
    untrimmed = reason(parse_row(row, mapping={"turns": CHAT}))
    assert "starts with the assistant" in untrimmed
    nothing = parse_row(chat("d您好", "p谢谢"), mapping={"turns": {**CHAT, "trim": True}})
    assert "no question with an answer" in reason(nothing)


def test_turns_are_read_by_position_and_in_pairs() -> None:
    row = {"conv": [["client", Q], ["counselor", A]]}
    mapping = {"turns": {"column": "conv", "role": 0, "content": 1}}
    assert turns(parse_row(row, mapping=mapping)) == ONE
    assert "turn 1 has 1 items, none at 1" in reason(
        parse_row({"conv": [["client"]]}, mapping=mapping)
    )
    pairs = {"conv": [{"system": "S", "in": Q, "out": A}, {"in": Q, "out": A}]}
    mapping = {
        "system": "{{ conv[0].system }}",
        "turns": {"column": "conv", "pairs": ["in", "out"]},
    }
    assert turns(parse_row(pairs, mapping=mapping)) == [("system", "S"), *ONE, *ONE]
    empty = {"conv": [{"system": "S", "in": Q, "out": ""}]}
    assert "turn 1, out is empty" in reason(parse_row(empty, mapping=mapping))


@pytest.mark.parametrize(
    ("dirty", "expected"),
    [
        ("“你好”，（全角）：ＡＢＣ……１２３", "“你好”，（全角）：ＡＢＣ……１２３"),
        (
            "it\u2019s 37.5\u00b0C \u00b1 0.2 \u00b7 ok",
            "it\u2019s 37.5\u00b0C \u00b1 0.2 \u00b7 ok",
        ),
        ("\u3000段首\r\n第二行\r第三行 ", "段首\n第二行\n第三行"),
        ("a\x00b\x07c\x1b[31md\ufeff\tz", "abcd\tz"),
        ("Ã©tude naÃ¯ve", "étude naïve"),
        ("don\u00e2\u20ac\u2122t", "don\u2019t"),
        ("a &lt; b &amp; c", "a < b & c"),
        ("bad \ud800 surrogate", "bad \ufffd surrogate"),
        ("Crème brûlée, Sjögren, 5 µg", "Crème brûlée, Sjögren, 5 µg"),
        ("l’école, cœur, Ærø, Пациент", "l’école, cœur, Ærø, Пациент"),
        ("été\nlâ€™Ã©cole", "été\nl’école"),
        ("ﬁne, Ĳssel, e\u0301", "fine, IJssel, é"),
    ],
)
def test_cleaning_repairs_damage_and_leaves_chinese_punctuation(dirty: str, expected: str) -> None:
    assert clean_text(dirty) == expected
    assert clean_text(expected) == expected

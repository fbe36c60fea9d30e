"""A reply counts only if it clearly gives one answer."""

import pytest

from medgpt.eval.tasks.mcq_parsing import ParsedReply, parse_mcq_reply

OPTIONS = {"A": "淋球菌", "B": "草绿色链球菌", "C": "葡萄球菌", "D": "流感嗜血杆菌"}
ENGLISH = {"A": "Heparin", "B": "Warfarin", "C": "Aspirin", "D": "a statin"}


@pytest.mark.parametrize(
    ("reply", "letters"),
    [
        ("B", "B"),
        ("b", "B"),
        ("Ｂ", "B"),
        ("（Ｂ）", "B"),
        ("(c)", "C"),
        ("B.", "B"),
        ("B。", "B"),
        ("**B**", "B"),
        ("B. 草绿色链球菌", "B"),
        ("B 草绿色链球菌", "B"),
        ("B草绿色链球菌", "B"),
        ("答案：B", "B"),
        ("答案：Ｂ", "B"),
        ("答案: b", "B"),
        ("答案是B。", "B"),
        ("正确答案为（B）", "B"),
        ("答案B", "B"),
        ("选B", "B"),
        ("应选择 B 项", "B"),
        ("正确选项是B", "B"),
        ("本题考查心内膜炎。A项错误，C项见于急性者，故选B。", "B"),
        ("淋球菌少见(A错)，所以答案是B。", "B"),
        ("不选A，也不选C。选B。", "B"),
        ("我无法完全确定，但答案是B。", "B"),
        ("答案：B\n\n解析：选B是因为它最常见。", "B"),
        (r"\boxed{B}", "B"),
        ("答案为“B”", "B"),
        ("答案是‘B’。", "B"),
        ("“B”", "B"),
        ("不能选A，应为B。", "B"),
        ("不应选A，应选B。", "B"),
        ("选A是错误的，正确答案是B。", "B"),
        ("如果选A就错了，所以答案是B。", "B"),
        ("错误答案是A，正确答案是B。", "B"),
        ("排除答案A，答案是B。", "B"),
        ("A错误故选B", "B"),
        ("答案是A吗？不，答案是B。", "B"),
        ("我不认为答案是A。\nB", "B"),
        ("毫无疑问选B", "B"),
        ("不难看出答案是B", "B"),
        ("选B是因为A错误。", "B"),
        ("选B排除A", "B"),
        ("答案是B(错误选项:A、C)", "B"),
        ("答案：B\nA错误：淋球菌少见", "B"),
    ],
)
def test_a_chinese_answer_is_read(reply: str, letters: str):
    assert parse_mcq_reply(reply, OPTIONS, multiple=False) == ParsedReply("answer", letters)


@pytest.mark.parametrize(
    ("reply", "letters"),
    [
        ("Answer: C", "C"),
        ("The answer is (c).", "C"),
        ("the correct option is C, because it inhibits cyclooxygenase", "C"),
        ("Option C is correct.", "C"),
        ("C. Aspirin", "C"),
        ("C) Aspirin", "C"),
        ("Heparin needs antithrombin; warfarin is slow. I would choose C.", "C"),
        ("Answer: **C**", "C"),
        ("The wrong answer is A. The right answer is C.", "C"),
        ("I don't think the answer is A, the answer is C.", "C"),
        ("Option A is incorrect and the answer is C.", "C"),
        ("It is not hard to see that the answer is C.", "C"),
        ("If the answer is A, dabigatran would be missing. The answer is C.", "C"),
    ],
)
def test_an_english_answer_is_read(reply: str, letters: str):
    assert parse_mcq_reply(reply, ENGLISH, multiple=False) == ParsedReply("answer", letters)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "草绿色链球菌",  # the text alone: strict
        "A和B都对",
        "答案：AB",
        "答案：A或B",
        "答案：A。不对，答案：B。",
        "选A还是选B?",
        "(A)(B)",
        "答案：F",
        "A错误，B正确。",
        "A. 淋球菌\nB. 草绿色链球菌\nC. 葡萄球菌\nD. 流感嗜血杆菌",
        "选项A错误",
        "答案不是A",
        "不选A",
        "不应选B",
        "不能选A",
        "选A是错误的",
        "选A就错了",
        "答案A不对",
        "如果选A就错了",
        "错误答案是A",
        "错误的选项是A",
        "排除答案A",
        "我不认为答案是B",
        "容易误选A",
        "患者应为A型流感",
        "答案是A吗?",
        "答案是A还是B",
        "我不认为答案是A。答案是A。",
        "The wrong answer is A.",
        "Incorrect answer: A",
        "I don't think the answer is B.",
        "The answer is A is wrong.",
        "Is the answer A?",
        "ABCD",
        "BCG vaccine",
    ],
)
def test_a_reply_without_one_clear_answer_is_invalid(reply: str):
    assert parse_mcq_reply(reply, OPTIONS, multiple=False) == ParsedReply("invalid")


@pytest.mark.parametrize(
    "reply",
    ["A patient like this needs a doctor.", "a statin", "The answer is a statin", "Aspirin"],
)
def test_an_english_sentence_is_not_a_letter(reply: str):
    assert parse_mcq_reply(reply, ENGLISH, multiple=False) == ParsedReply("invalid")


@pytest.mark.parametrize(
    "reply",
    [
        "抱歉，我不能回答这个问题。",
        "对不起，作为一个AI，我无法提供医疗建议。",
        "我无法判断A还是B。",
        "I'm sorry, but I can't help with that.",
        "As an AI, I cannot answer medical questions.",
    ],
)
def test_a_refusal_is_distinguished_from_an_invalid_reply(reply: str):
    assert parse_mcq_reply(reply, OPTIONS, multiple=False) == ParsedReply("refused")


@pytest.mark.parametrize(
    ("reply", "letters"),
    [
        ("答案：ABD", "ABD"),
        ("答案：ＡＢＤ", "ABD"),
        ("答案：D、B、A", "ABD"),
        ("答案是A,B和D。", "ABD"),
        ("选ABD", "ABD"),
        ("A、B、D", "ABD"),
        ("选(A)(B)(D)", "ABD"),
        ("(A)(B)(D)", "ABD"),
        ("答案：A或B", ""),
        ("A. 淋球菌\nB. 草绿色链球菌\nD. 流感嗜血杆菌", "ABD"),
        ("答案：\nA\nB\nD", "ABD"),
        ("答案：B", "B"),
    ],
)
def test_several_letters_are_a_set_where_several_are_right(reply: str, letters: str):
    kind = "answer" if letters else "invalid"
    assert parse_mcq_reply(reply, OPTIONS, multiple=True) == ParsedReply(kind, letters)

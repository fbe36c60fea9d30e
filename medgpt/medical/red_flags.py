"""How urgent the signs in a question are, in Chinese and English.

A sign counts unless it is denied ("no chest pain"), past, or asked about in general ("what are the
signs of a stroke?"). The danger signs of the sample knowledge are recognized word for word. Most
questions have no level that a rule could recognize.
"""

import re
import tomllib
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from medgpt.medical.text import normalize_text, split_sentences
from medgpt.medical.urgency import URGENCY_LEVELS, UrgencyLevel

DATA = Path(__file__).parent / "red_flags.toml"
KNOWN_SIGNS = Path(__file__).parent / "known_signs.toml"
CLAUSE = re.compile(r"[,。;!?:\n]|\.(?=\s|$)|\b(?:but|and then)\b|但是?|却|只是")
DENIED = re.compile(
    r"(?:没有?|无|未|不(?!停|能|到|清|再发抖|省|出|断|会动|听|肯)|否认|从不|从未|排除|预防|防止"
    r"|避免)[^,。;但却]{0,12}$"
    r"|(?:\b(?:no|not|never|without|denies|denied|none of|nor|neither)\b|n't\b)[^.;]{0,40}$",
    re.IGNORECASE,
)
NORMAL = re.compile(
    r"[^,。;]{0,6}(?:正常|如常|平稳|有力|良好|不错)|[^,.;]{0,20}\b(?:normal|strong|as usual"
    r"|quietly)\b",
    re.IGNORECASE,
)
PAST = re.compile(
    r"(?:[一二三四五六七八九十几两\d]+年前|去年|前年|以前|曾经?|小时候|多年前)"
    r"|\b(?:(?:\w+ )?years? ago|last year|used to|in the past|once had|as a child|long ago)\b",
    re.IGNORECASE,
)
IN_GENERAL = re.compile(
    r"有(?:哪些|什么)(?:症状|表现|原因|危险|特点|信号|类型)|什么是|是什么病|的(?:症状|病因|原因"
    r"|发病机制|治疗方法)(?:是|有)|怎[么样](?:预防|治疗|康复|诊断|发生|形成|确诊)"
    r"|哪些(?:情况|因素|人|症状)|什么情况|(?:以后|之后)怎[么样]|为什么会(?:得|有)"
    r"|\b(?:what (?:is|are|causes)|how (?:is|are|does one|can one|do you)|when should (?:one"
    r"|someone|people)|which)\b",
    re.IGNORECASE,
)
OWN_CASE = re.compile(
    r"我|他|她|孩子|宝宝|患者|爸|妈|老人|岁|今天|昨|现在|突然|小时|分钟"
    r"|\b(?:i|my|he|she|his|her|today|now|sudden\w*|year-old|minutes|hours)\b",
    re.IGNORECASE,
)
KNOWN_LEVELS: tuple[UrgencyLevel, ...] = ("emergency", "today", "days")
SHORT_QUESTION_CHARS = 40  # a shorter question that names a disease is about the disease
QUOTED = re.compile('["“「]([^"“”「」]+)["”」]')
Sign = tuple[re.Pattern[str], ...]


@lru_cache(maxsize=4096)  # the answers to one question are judged one after the other
def required_urgency(question: str) -> UrgencyLevel | None:
    """Return the most urgent level that a sign in the question requires; None without a sign."""
    text = normalize_text(question)
    if (known_level := _level_of_quoted_fact(text)) is not None:
        return known_level
    if _is_general_question(text):
        return None
    for level in reversed(URGENCY_LEVELS):
        if any(_has_sign(sign, text) for sign in _signs_by_level()[level]):
            return level
    return None


def _is_general_question(text: str) -> bool:
    """Return whether the question is about a disease or its signs, not about a patient."""
    if len(split_sentences(text)) > 1 or OWN_CASE.search(text):
        return False
    is_short = len(text) <= SHORT_QUESTION_CHARS and "," not in text
    names_disease = is_short and any(name in text for name in disease_names())
    return names_disease or bool(IN_GENERAL.search(text))


@cache
def disease_names() -> tuple[str, ...]:
    return tuple(condition["name"] for condition in _conditions())


def _has_sign(sign: Sign, text: str) -> bool:
    return all(any(_is_affirmed(text, m) for m in pattern.finditer(text)) for pattern in sign)


def _is_affirmed(text: str, match: re.Match[str]) -> bool:
    before = CLAUSE.split(text[: match.start()])[-1]
    if DENIED.search(before) or PAST.search(before + match.group()):
        return False
    return not NORMAL.match(CLAUSE.split(text[match.end() :])[0])


@cache
def _signs_by_level() -> dict[UrgencyLevel, list[Sign]]:
    data = tomllib.loads(DATA.read_text("utf-8"))
    return {
        level: [
            tuple(re.compile(pattern, re.IGNORECASE) for pattern in sign)
            for language in ("zh", "en")
            for sign in data[f"{level}_{language}"]
        ]
        for level in URGENCY_LEVELS
    }


def _level_of_quoted_fact(text: str) -> UrgencyLevel | None:
    """Return the level of a quoted danger sign of the sample knowledge, or None."""
    quoted = set(QUOTED.findall(text))
    return next((level for fact, level in _known_facts() if fact in quoted), None)


@cache
def _known_facts() -> tuple[tuple[str, UrgencyLevel], ...]:
    return tuple(
        (normalize_text(fact), level)
        for condition in _conditions()
        for level in KNOWN_LEVELS
        for fact in condition[level]
    )


@cache
def _conditions() -> list[dict[str, Any]]:
    """Return the name of each disease and its signs for each level."""
    return tomllib.loads(KNOWN_SIGNS.read_text("utf-8"))["conditions"]

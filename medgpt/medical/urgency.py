"""The level of urgency that an answer advises, in Chinese and English.

An answer may state its level on a line of its own; otherwise its sentences are read. Conditional
advice ("call 120 if it gets worse") and denied advice ("no need to see a doctor") do not count. Of
several levels the most urgent counts.
"""

import re
from typing import Literal

from medgpt.medical.text import normalize_text

UrgencyLevel = Literal["self_care", "days", "today", "emergency"]
URGENCY_LEVELS: tuple[UrgencyLevel, ...] = (
    "self_care",
    "days",
    "today",
    "emergency",
)  # in increasing order

STATED = re.compile(r"(?:紧急程度|urgency(?: level)?)\W{0,6}(.+)", re.IGNORECASE)
LABELS: dict[UrgencyLevel, str] = {
    "emergency": "立即(?:呼叫)?急救|急救|emergency now|emergency",
    "today": "当[天日]就?[医诊]|今[天日]就?[医诊]|same day|see a doctor today",
    "days": "几天内就?[医诊]|近[日期]就?[医诊]|within days|within a few days",
    "self_care": "自我护理|self[- ]?care",
}
SENTENCE = re.compile(r"[^。！？!?；;\n]+?(?:\.(?!\d)|[。！？!?；;\n]|$)")
CLAUSE = re.compile("[,，、:：]")
NUMBER = r"(?<!\d)(?:120|119|999|911|112|995|110)(?!\d|\s?(?:次|岁|mm))"
VISIT = (
    "(?:就医|就诊|看(?:医生|病|门诊|大夫)|(?:去|到|上)(?:附近的?|当地的?|最近的?)?(?:医院|诊所))"
)
DAY = (
    "(?:今[天日晚]|当[天日晚]|(?:二十四|24 ?)小时[之以]?内|尽快|尽早|及时|赶快|抓紧|马上|立即|立刻)"
)
DOCTOR = r"(?:doctor|gp|physician|clinic|hospital|surgery|midwife|clinician|medical|appointment)"
SOON = (
    "(?:today|tonight|same[- ]day|within 24 hours|as soon as possible|urgent(?:ly)?|right away"
    "|promptly)"
)
PATTERNS: dict[UrgencyLevel, str] = {
    "emergency": (
        rf"(?:拨打|呼叫|打|叫|联系|拨)\S{{0,6}}?(?:{NUMBER}|急救|救护车)|(?:叫|呼叫|找)救护车"
        r"|(?:去|到|前往|送往?|送到|转|看|挂)\S{0,8}?急诊|急诊(?:就[医诊]|处理|手术)"
        r"|(?:立即|立刻|马上)(?:送医|送(?:往|到)?医院|抢救|急救)"
        rf"|\b(?:call|dial|phone|ring)\b[^,.;]{{0,30}}?(?:{NUMBER}|ambulance|emergency)"
        r"|\b(?:go|get|taken?|come|rush|head|brought)\b[^,.;]{0,40}?"
        r"(?:emergency (?:room|department)|\bA&E|\bED\b|\bER\b|casualty)"
        r"|\b(?:seek|get|needs?)\b[^,.;]{0,12}?(?:emergency|immediate)(?: medical)? "
        r"(?:care|attention|help|treatment|assistance)"
        r"|\b(?:this|it) is (?:a|an) (?:medical )?emergency"
    ),
    "today": (
        rf"{DAY}[^。]{{0,10}}?{VISIT}|{VISIT}\S{{0,4}}?(?:今[天日]|当[天日])"
        rf"|{DAY}[^。]{{0,12}}?(?:急诊|复诊|门诊|检查)"
        rf"|(?:{DOCTOR})\b[^.;]{{0,40}}?\b{SOON}|\b{SOON}\b[^.;]{{0,40}}?\b{DOCTOR}"
        rf"|\b(?:seen|examined|assessed|checked|reviewed)\b[^.;]{{0,30}}?\b{SOON}"
    ),
    "days": (
        rf"{VISIT}|门诊|预约|择期"
        rf"|\b(?:see|visit|consult|contact|call|ask|book|make)\b[^.;]{{0,30}}?\b{DOCTOR}"
        r"|within (?:a few|the next few|several|two|three|\d) (?:days|weeks)|\bthis week\b"
    ),
    "self_care": (
        rf"(?:不(?:需要?|用|必)|无[需须]|没必要|暂不|先不)\S{{0,6}}?{VISIT}"
        "|在家|居家|自我护理|自行(?:护理|处理|缓解|恢复)|多(?:喝|饮)(?:点|些)?水|休息|热敷|冷敷"
        "|观察"
        r"|\bat home\b|\bself[- ]?care\b|\brest\b|\bdrink (?:plenty|lots|more|water|fluids)|"
        r"\bpharmac(?:y|ist)\b|\bover[- ]the[- ]counter\b|\bon its own\b"
        r"|\b(?:no need|not need|n't need|unnecessary) (?:for|to see)\b[^.;]{0,15}\bdoctor"
    ),
}
RULES: dict[UrgencyLevel, re.Pattern[str]] = {
    level: re.compile(pattern, re.IGNORECASE) for level, pattern in PATTERNS.items()
}
THIS_CASE = re.compile(  # not a condition: it refers to the symptoms in the question
    "(?:出现|有|遇到|存在)(?:您?你?(?:说|描述)的)?(?:这种|这样的?|这些|上述|此类)(?:情况|症状|表现)"
    "(?!.{0,6}(?:加重|恶化|不缓解|持续|变))"
)
CONDITION = re.compile(
    "如果|若|一旦|倘若|假如|要是|万一|除非|的话|如(?:出现|有|不|症状|持续|加重|伴|无)"
    "|(?:遇到|突发|发生)[^,，]{0,20}?时|[、][^,，]{1,30}?时(?=[,，]?(?:要|应|请|需|须|立即|立刻"
    "|马上))"
    "|有(?:立即|生命|轻生|自杀)[^,，]{0,4}(?:危险|念头|想法)|(?:有|出现)(?:下列|以下|任何)|都没有时"
    "|(?:出现|发生|加重|恶化|不缓解)[^,，]{0,12}?时"
    r"|\b(?:if|unless|in case|in the event|whenever)\b"
    r"|\bshould (?:you|it|the|he|she|they|symptoms|any)\b",
    re.IGNORECASE,
)
CONDITION_AFTER = re.compile(r"[^,]{0,40}?\b(?:if|unless|in case|should)\b", re.IGNORECASE)
OTHERWISE = re.compile(r"否则|不然|\botherwise\b", re.IGNORECASE)
DENIED_BEFORE = re.compile(
    "(?:不(?:需要?|用|必|要|建议|是|能|可|应)|无[需须]|没(?:有)?必要|并非|别|而不是|勿|未必|谈不上)"
    "[^,，]{0,8}$"
    r"|(?:\b(?:no need|not|never|rather than|instead of|unnecessary|without)\b|n't\b)[^,]{0,30}$",
    re.IGNORECASE,
)
DENIED_AFTER = re.compile(
    r"\s*(?:是?(?:不需要|不必要|没有?必要|多余)"
    r"|(?:is|are|would be) (?:not|un)\s?(?:needed|necessary))",
    re.IGNORECASE,
)


def advised_urgency(answer: str) -> UrgencyLevel | None:
    """Return the level that the answer advises; None if it advises none."""
    answer = normalize_text(answer)
    for line in reversed(STATED.findall(answer)):
        if level := _labelled_level(line):
            return level
    prose = STATED.sub("", answer)
    levels: set[UrgencyLevel] = {
        level for sentence in SENTENCE.findall(prose) for level in _advised_levels(sentence)
    }
    return max(levels, key=lambda level: URGENCY_LEVELS.index(level)) if levels else None


def _labelled_level(text: str) -> UrgencyLevel | None:
    """Return the only level that a line names; None if it names none or several."""
    named_levels: list[UrgencyLevel] = [
        level for level, label in LABELS.items() if re.search(label, text, re.IGNORECASE)
    ]
    return named_levels[0] if len(named_levels) == 1 else None


def _advised_levels(sentence: str) -> set[UrgencyLevel]:
    """Return the levels that a sentence advises unconditionally."""
    sentence = THIS_CASE.sub("", sentence)
    return {
        level
        for level, rule in RULES.items()
        for match in rule.finditer(sentence)
        if not _is_conditional(sentence, match) and not _is_denied(sentence, match)
    }


def _is_conditional(sentence: str, match: re.Match[str]) -> bool:
    before = OTHERWISE.split(sentence[: match.start()])[-1] + match.group()
    return bool(CONDITION.search(before) or CONDITION_AFTER.match(sentence[match.end() :]))


def _is_denied(sentence: str, match: re.Match[str]) -> bool:
    before = CLAUSE.split(sentence[: match.start()])[-1]
    return bool(DENIED_BEFORE.search(before) or DENIED_AFTER.match(sentence[match.end() :]))

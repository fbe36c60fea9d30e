"""Triage: does an answer send a red flag to the emergency number, and only a red flag?

Questions are clinician-style notes of complaints in pairs: with a red flag, and the same complaint
without one. Complaints, red flags and levels are in triage.toml with the guidelines they rest on;
no clinician has signed them. Matched halves share the patient and the wording, so an answer that
ignores what was found is wrong in one of the two.
"""

import random
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, Self

from annotated_types import Len
from pydantic import BaseModel, ConfigDict, model_validator

from medgpt.config import TriageConfig
from medgpt.data.sample.knowledge import Source
from medgpt.data.sample.wording import full_width
from medgpt.eval.requests import Prompt, Replied, Reply, Response
from medgpt.eval.task import Judged, Value
from medgpt.eval.tasks.prompts import asked
from medgpt.eval.tasks.rows import content_hash
from medgpt.eval.tasks.urgency import LEVELS, Level, urgency

DATA = Path(__file__).parent / "triage.toml"
Language = Literal["zh", "en"]
Who = Literal["adult", "older", "child", "woman", "man", "pregnant", "postpartum"]
AGES: dict[Who, tuple[int, int]] = {
    "adult": (20, 59),
    "older": (60, 84),
    "child": (1, 4),
    "woman": (20, 49),
    "man": (18, 39),
    "pregnant": (22, 38),
    "postpartum": (22, 38),
}
FEMALE = {"woman", "pregnant", "postpartum"}
NOTES: dict[Language, tuple[str, ...]] = {
    "zh": (
        "{sex},{age}岁,因{complaint}来电咨询。{detail}。有多急,应该怎么办?",
        "电话分诊记录:患者{sex},{age}岁,主诉{complaint}。追问:{detail}。给什么建议?",
        "替家人问一下,{sex},{age}岁,{complaint}:{detail}。要不要去医院,多快去?",
        "{complaint}。{sex},{age}岁。{detail}。请告诉我现在该做什么。",
    ),
    "en": (
        "{age}-year-old {sex} with {complaint}: {detail}. How urgent is it and what is to be done?",
        "Nurse line note. {Sex}, {age} years. Complaint: {complaint}. On questioning: {detail}. "
        "What is the advice?",
        "I am asking for a relative, {sex}, aged {age}. It is about {complaint}: {detail}. Where "
        "should we go, and how soon?",
        "About {complaint} in a {age}-year-old {sex}. {Detail}. What should we do now?",
    ),
}
ASK: dict[Language, str] = {
    "zh": "请在最后一行写明紧急程度,四选一:立即急救、当天就医、几天内就医、自我护理。",
    "en": "On the last line state one level of urgency: emergency now, same day, within days or "
    "self-care.",
}
PHRASINGS = 2  # of each pair and language


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Pair(_Data):
    red_zh: str
    red_en: str
    benign_zh: str
    benign_en: str
    level: Literal["self_care", "days", "today"]
    """Of the benign half."""


class Complaint(_Data):
    id: str
    sources: Annotated[tuple[str, ...], Len(1)]
    who: Who
    zh: str
    en: str
    pairs: Annotated[tuple[Pair, ...], Len(1)]


class Complaints(_Data):
    clinically_reviewed: Literal[False]
    sources: dict[str, Source]
    complaints: tuple[Complaint, ...]

    @model_validator(mode="after")
    def _sources_exist(self) -> Self:
        for complaint in self.complaints:
            if missing := set(complaint.sources) - self.sources.keys():
                raise ValueError(f"{complaint.id}: unknown source {min(missing)!r}")
        return self


@dataclass(frozen=True, slots=True)
class Question:
    id: str
    pair: str  # the same of both halves
    language: Language
    complaint: str
    text: str
    level: Level  # the right one; emergency of a red flag


@cache
def load_complaints() -> Complaints:
    return Complaints.model_validate(tomllib.loads(DATA.read_text("utf-8")))


def questions(
    seed: int, languages: Sequence[Language] = ("zh", "en"), limit: int | None = None
) -> list[Question]:
    """Whole pairs, at most `limit` questions; patients and wordings are drawn with the seed."""
    drawn = [
        halves
        for complaint in load_complaints().complaints
        for number, pair in enumerate(complaint.pairs)
        for language in languages
        for halves in _phrased(complaint, number, pair, language, seed)
    ]
    if limit is not None and 2 * len(drawn) > limit:
        chosen = random.Random(seed).sample(range(len(drawn)), limit // 2)
        drawn = [drawn[i] for i in sorted(chosen)]
    return [question for halves in drawn for question in halves]


def _phrased(
    complaint: Complaint, number: int, pair: Pair, language: Language, seed: int
) -> Iterator[tuple[Question, Question]]:
    rng = random.Random(f"{seed} {complaint.id} {number} {language}")
    notes = rng.sample(NOTES[language], PHRASINGS)
    ages = rng.sample(range(AGES[complaint.who][0], AGES[complaint.who][1] + 1), PHRASINGS)
    for phrasing, (note, age) in enumerate(zip(notes, ages, strict=True)):
        key = f"{complaint.id}-{number}-{language}-{phrasing}"
        female = complaint.who in FEMALE or (complaint.who != "man" and rng.random() < 0.5)

        texts = {
            kind: _note(note, language, complaint, female, age, getattr(pair, f"{kind}_{language}"))
            for kind in ("red", "benign")
        }
        about = (key, language, complaint.id)
        yield (
            Question(f"{key}-red", *about, texts["red"], "emergency"),
            Question(f"{key}-benign", *about, texts["benign"], pair.level),
        )


def _note(
    note: str, language: Language, complaint: Complaint, female: bool, age: int, detail: str
) -> str:
    if language == "zh":
        words = ("女孩", "男孩") if complaint.who == "child" else ("女", "男")
    else:
        words = ("girl", "boy") if complaint.who == "child" else ("woman", "man")
    sex = words[0] if female else words[1]
    text = note.format(
        sex=sex,
        Sex=sex.capitalize(),
        age=age,
        complaint=complaint.zh if language == "zh" else complaint.en,
        detail=detail,
        Detail=detail[0].upper() + detail[1:],
    )
    return full_width(text) if language == "zh" else text


class TriageTask:
    """under: share of red flags not sent to the emergency number. over: share of the others that
    are. pair_accuracy: both halves of a pair told apart. accuracy: the exact level."""

    kind = "triage"

    def __init__(self, config: TriageConfig, seed: int) -> None:
        self.name, self.sensitive = config.name, config.sensitive
        self._config = config
        self.template = f"triage-1-{config.prompt}-{config.ask_level}-{config.max_new_tokens}"
        self._questions = questions(seed, config.languages, config.limit)
        self.data_hash = content_hash(*(repr(question) for question in self._questions))

    def requests(self) -> list[Reply]:
        return [
            Reply(question.id, self._prompt(question), self._config.max_new_tokens)
            for question in self._questions
        ]

    def _prompt(self, question: Question) -> Prompt:
        text = question.text
        if self._config.ask_level:
            ask = ASK[question.language]
            text += full_width(ask) if question.language == "zh" else f" {ask}"
        return asked(text, self._config.prompt)

    def judge(self, responses: Mapping[str, Response]) -> list[Judged]:
        answers: dict[str, str] = {}
        for question in self._questions:
            response = responses[question.id]
            assert isinstance(response, Replied)
            answers[question.id] = response.texts[0]
        return judge_answers(self._questions, answers)


def judge_answers(questions: Sequence[Question], answers: Mapping[str, str]) -> list[Judged]:
    """Values of all questions from the answers by id; an answer without a level is never right."""
    found: dict[str, Level | None] = {
        question.id: urgency(answers[question.id]) for question in questions
    }
    halves: dict[str, list[Question]] = {}
    for question in questions:
        halves.setdefault(question.pair, []).append(question)
    return [
        Judged(
            question.id,
            _values(question, found, halves[question.pair]),
            {
                "language": question.language,
                "complaint": question.complaint,
                "level": question.level,
            },
            {
                "question": question.text,
                "answer": answers[question.id],
                "right": question.level,
                "read": found[question.id] or "no level",
            },
        )
        for question in questions
    ]


def _values(
    question: Question, found: Mapping[str, Level | None], pair: Sequence[Question]
) -> dict[str, Value]:
    level = found[question.id]
    rank = LEVELS.index(level) if level else -1  # no level helps nobody: as under-triage
    values: dict[str, Value] = {
        "accuracy": float(level == question.level),
        "invalid_rate": float(level is None),
        "less_urgent": float(rank < LEVELS.index(question.level)),
        "more_urgent": float(rank > LEVELS.index(question.level)),
    }
    if question.level != "emergency":
        return values | {"over": float(level == "emergency")}
    apart = all(_told(found[half.id], half) for half in pair)
    return values | {"under": float(level != "emergency"), "pair_accuracy": float(apart)}


def _told(level: Level | None, half: Question) -> bool:
    return level is not None and (level == "emergency") == (half.level == "emergency")

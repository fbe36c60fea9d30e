"""Complaints with a red flag, and the same complaints without one, at four levels of urgency.

Questions are clinician-style notes of complaints in pairs: with a red flag, and the same complaint
without one. Complaints, red flags and levels are in triage.toml with the guidelines they rest on;
no clinician has signed them. Matched halves share the patient and the wording, so an answer that
ignores what was found is wrong in one of the two.
"""

import random
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, Self

from annotated_types import Len
from pydantic import BaseModel, ConfigDict, model_validator

from medgpt.data.citation import Citation
from medgpt.data.sources.punctuation import full_width
from medgpt.data.sources.rows import within
from medgpt.medical.urgency import Level

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
    sources: dict[str, Citation]
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
    seed: int,
    languages: Sequence[Language] = ("zh", "en"),
    limit: int | None = None,
    part: tuple[float, float] = (0.0, 1.0),
) -> list[Question]:
    """Whole pairs, at most `limit` questions; patients and wordings are drawn with the seed.

    Args:
        part: of the complaints, only those whose hash lies within it.
    """
    drawn = [
        halves
        for complaint in load_complaints().complaints
        if within(complaint.id, part)
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

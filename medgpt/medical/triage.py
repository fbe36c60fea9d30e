"""Triage questions in pairs: a complaint with a red flag, and the same complaint without one.

The questions are clinician-style notes. triage.toml has the complaints, red flags and levels with
the guidelines they are based on; no clinician has reviewed them. Both halves of a pair share the
patient and the wording, so an answer that ignores the finding is wrong in one of them.
"""

import random
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, Self

from annotated_types import Len
from pydantic import model_validator

from medgpt.config.base import Config
from medgpt.data.citation import Citation
from medgpt.data.sources.punctuation import full_width
from medgpt.data.sources.sampling import in_hash_range
from medgpt.medical.text import Language
from medgpt.medical.urgency import UrgencyLevel

DATA = Path(__file__).parent / "triage.toml"
PatientGroup = Literal["adult", "older", "child", "woman", "man", "pregnant", "postpartum"]
AGES: dict[PatientGroup, tuple[int, int]] = {
    "adult": (20, 59),
    "older": (60, 84),
    "child": (1, 4),
    "woman": (20, 49),
    "man": (18, 39),
    "pregnant": (22, 38),
    "postpartum": (22, 38),
}
FEMALE = {"woman", "pregnant", "postpartum"}
NOTE_TEMPLATES: dict[Language, tuple[str, ...]] = {
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
PHRASINGS_PER_PAIR = 2  # notes per pair and language


class Pair(Config):
    red_zh: str
    red_en: str
    benign_zh: str
    benign_en: str
    level: Literal["self_care", "days", "today"]
    """Urgency of the benign half."""


class Complaint(Config):
    id: str
    sources: Annotated[tuple[str, ...], Len(1)]
    who: PatientGroup
    zh: str
    en: str
    pairs: Annotated[tuple[Pair, ...], Len(1)]


class Complaints(Config):
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
class TriageQuestion:
    id: str
    pair: str  # id that both halves share
    language: Language
    complaint: str
    text: str
    level: UrgencyLevel  # the right level; emergency for a red flag


@cache
def load_complaints() -> Complaints:
    return Complaints.model_validate(tomllib.loads(DATA.read_text("utf-8")))


def triage_questions(
    seed: int,
    languages: Sequence[Language] = ("zh", "en"),
    limit: int | None = None,
    hash_range: tuple[float, float] = (0.0, 1.0),
) -> list[TriageQuestion]:
    """Return both halves of every pair, at most `limit` questions.

    Args:
        seed: draws patients and wordings, and the pairs if `limit` applies.
        hash_range: keep only complaints whose hash, in [0, 1), lies in this range.
    """
    pairs = [
        halves
        for complaint in load_complaints().complaints
        if in_hash_range(complaint.id, hash_range)
        for number, pair in enumerate(complaint.pairs)
        for language in languages
        for halves in _write_pair(complaint, number, pair, language, seed)
    ]
    if limit is not None and 2 * len(pairs) > limit:
        indices = random.Random(seed).sample(range(len(pairs)), limit // 2)
        pairs = [pairs[i] for i in sorted(indices)]
    return [question for halves in pairs for question in halves]


def _write_pair(
    complaint: Complaint, number: int, pair: Pair, language: Language, seed: int
) -> Iterator[tuple[TriageQuestion, TriageQuestion]]:
    rng = random.Random(f"{seed} {complaint.id} {number} {language}")
    templates = rng.sample(NOTE_TEMPLATES[language], PHRASINGS_PER_PAIR)
    ages = rng.sample(range(AGES[complaint.who][0], AGES[complaint.who][1] + 1), PHRASINGS_PER_PAIR)
    for phrasing, (template, age) in enumerate(zip(templates, ages, strict=True)):
        pair_id = f"{complaint.id}-{number}-{language}-{phrasing}"
        is_female = complaint.who in FEMALE or (complaint.who != "man" and rng.random() < 0.5)
        texts = {
            kind: _write_note(
                template, language, complaint, is_female, age, getattr(pair, f"{kind}_{language}")
            )
            for kind in ("red", "benign")
        }
        about = (pair_id, language, complaint.id)
        yield (
            TriageQuestion(f"{pair_id}-red", *about, texts["red"], "emergency"),
            TriageQuestion(f"{pair_id}-benign", *about, texts["benign"], pair.level),
        )


def _write_note(
    template: str, language: Language, complaint: Complaint, is_female: bool, age: int, detail: str
) -> str:
    if language == "zh":
        words = ("女孩", "男孩") if complaint.who == "child" else ("女", "男")
    else:
        words = ("girl", "boy") if complaint.who == "child" else ("woman", "man")
    sex = words[0] if is_female else words[1]
    text = template.format(
        sex=sex,
        Sex=sex.capitalize(),
        age=age,
        complaint=complaint.zh if language == "zh" else complaint.en,
        detail=detail,
        Detail=detail[0].upper() + detail[1:],
    )
    return full_width(text) if language == "zh" else text

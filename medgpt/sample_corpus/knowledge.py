"""Schema of the hand-written knowledge of the sample corpus: one TOML file per department.

`clinically_reviewed` is false in every file: the texts cite their sources, but no clinician has
signed them. They exist to build and test the system, not to treat anyone.
"""

import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, Self

from annotated_types import Len
from pydantic import BaseModel, ConfigDict, StringConstraints, model_validator

from medgpt.data.citation import Citation

KNOWLEDGE_DIR = Path(__file__).parent / "knowledge"
DOSE = re.compile(
    r"\d+(\.\d+)?\s*(mg|g|ml|mL|µg|ug|μg|IU|毫克|克|毫升|微克|单位|片|粒|丸|滴|支)(?!/)|每[日天次]\s*\d+\s*次"
)

Phrase = Annotated[str, StringConstraints(min_length=1, max_length=40, pattern=r"^[^。!?!?;;\n]+$")]
Sentence = Annotated[str, StringConstraints(min_length=4, max_length=120, pattern=r"^[^\n]+[^。]$")]


class KnowledgeModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SourcedFacts(KnowledgeModel):
    source: str
    """Key of `Department.sources`."""


class Overview(SourcedFacts):
    text: Sentence
    """Completes `NAME是...`, without full stop."""


class PhraseList(SourcedFacts):
    items: Annotated[tuple[Phrase, ...], Len(2, 8)]
    """Short phrases that can stand in a list, the most typical first."""
    note: Sentence | None = None
    """One sentence that qualifies the list (for example: many patients have no symptoms)."""


class Mechanism(SourcedFacts):
    steps: Annotated[tuple[Sentence, ...], Len(2, 6)]
    """Full sentences in causal order, without full stop."""


class Urgency(SourcedFacts):
    """Advice on mere suspicion of a condition: call the emergency number, or see a doctor today."""

    level: Literal["emergency", "today"]


class Care(SourcedFacts):
    """When to seek care, below the level of an emergency."""

    today: Annotated[tuple[Phrase, ...], Len(1, 5)]
    routine: Annotated[tuple[Phrase, ...], Len(1, 5)]
    self_care: Annotated[tuple[Phrase, ...], Len(1, 6)]


class Misunderstanding(SourcedFacts):
    wrong: Sentence
    right: Sentence


class Contrast(SourcedFacts):
    """A safe sentence and its unsafe twin: a negation or one word apart (禁用 for 可用)."""

    safe: Sentence
    unsafe: Sentence


class Condition(KnowledgeModel):
    id: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+$")]
    name: str
    name_en: str
    aliases: tuple[str, ...] = ()
    overview: Overview
    urgency: Urgency | None = None
    symptoms: PhraseList
    causes: PhraseList
    mechanism: Mechanism
    tests: PhraseList
    treatment: PhraseList
    red_flags: PhraseList
    """Signs that each call for the emergency number now."""
    care: Care
    misunderstandings: Annotated[tuple[Misunderstanding, ...], Len(1, 3)]
    contrasts: Annotated[tuple[Contrast, ...], Len(1, 3)]


class Department(KnowledgeModel):
    clinically_reviewed: Literal[False]
    department: str
    sources: dict[str, Citation]
    conditions: Annotated[tuple[Condition, ...], Len(2, 8)]

    @model_validator(mode="after")
    def _sources_exist_and_no_doses(self) -> Self:
        for condition in self.conditions:
            for section in _sections(condition):
                if section.source not in self.sources:
                    raise ValueError(f"{condition.id}: unknown source {section.source!r}")
            if dose := DOSE.search(condition.model_dump_json()):
                raise ValueError(f"{condition.id}: numeric dose {dose.group()!r}")
            for contrast in condition.contrasts:
                if abs(len(contrast.safe) - len(contrast.unsafe)) > 4:
                    raise ValueError(
                        f"{condition.id}: a contrast is not a minimal pair: {contrast.safe!r}"
                    )
        return self


def _sections(condition: Condition) -> list[SourcedFacts]:
    values = [getattr(condition, name) for name in Condition.model_fields]
    flat = [x for value in values for x in (value if isinstance(value, tuple) else (value,))]
    return [x for x in flat if isinstance(x, SourcedFacts)]


@cache
def load_knowledge() -> tuple[Department, ...]:
    """Load all departments, in the order of their file names."""
    files = sorted(KNOWLEDGE_DIR.glob("*.toml"))
    return tuple(Department.model_validate(tomllib.loads(f.read_text("utf-8"))) for f in files)

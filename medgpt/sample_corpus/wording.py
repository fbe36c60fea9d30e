"""Fills templates with facts: the sentences of all records."""

import re

from medgpt.data.sources.punctuation import full_width, half_width
from medgpt.sample_corpus.knowledge import Condition, Department, Mechanism, Overview, PhraseList
from medgpt.sample_corpus.templates import TEXTS

SUICIDE = re.compile("自杀|轻生|自伤")
EMERGENCY_DEPARTMENT = "急诊科"  # has no outpatient clinic for follow-up
SPECIALIST = "相关专科"


class Wording:
    """Writes about conditions for one region."""

    def __init__(self, region: str, department_of: dict[str, Department]) -> None:
        """`department_of` maps condition ids to departments."""
        self.region, self.department_of = TEXTS.regions[region], department_of

    def fill(self, template: str, condition: Condition, fact: str = "") -> str:
        """Fill the template and return it with full-width punctuation."""
        department = self.department_of[condition.id].department
        values = {
            "fact": fact,
            "name": condition.name,
            "department": department,
            "clinic": SPECIALIST if department == EMERGENCY_DEPARTMENT else department,
            **self.region,  # last, because facts contain these placeholders too
        }
        for key, value in values.items():
            template = template.replace("{" + key + "}", value)
        return full_width(template)

    def fact(self, condition: Condition, field: str) -> str:
        """Return the fact of a field as text for a template."""
        if field == "care":
            care = condition.care
            return TEXTS.care.format(
                today="、".join(care.today),
                routine="、".join(care.routine),
                self_care="、".join(care.self_care),
            )
        section = getattr(condition, field)
        if isinstance(section, Overview):
            return section.text
        if isinstance(section, Mechanism):
            return "。".join(section.steps)
        return "、".join(section.items)

    def answer(self, condition: Condition, field: str) -> str:
        """Return the answer to every phrasing of a question about a field."""
        text = self.fill(TEXTS.answers[field], condition, self.fact(condition, field))
        section = getattr(condition, field)
        note = section.note if isinstance(section, PhraseList) else None
        if field == "treatment" and "医生" not in (note or ""):
            text += TEXTS.doctor_decides
        if note:
            text += self.fill(f"{note}。", condition)
        if condition.urgency and field in ("symptoms", "treatment"):
            text += self.fill(TEXTS.urgency[condition.urgency.level], condition)
        return text

    def is_unrelated(self, condition: Condition, field: str, other: Condition, *facts: str) -> bool:
        """Whether facts of another condition are wrong for this one: `other` belongs to another
        department, and none of the facts is similar to one of this condition."""
        own = char_bigrams(*getattr(condition, field).items)
        same = self.department_of[other.id] == self.department_of[condition.id]
        return not same and not own & char_bigrams(*facts)

    def with_hotline(self, text: str, condition: Condition) -> str:
        """Append the crisis hotline and the emergency number to a text about suicide."""
        if SUICIDE.search(text) and not all(value in text for value in self.region.values()):
            return text + self.fill(TEXTS.hotline, condition)
        return text


def alternate_punctuation(text: str, number: int) -> str:
    """Return half-width punctuation for an even `number`, full-width for an odd one."""
    return full_width(text) if number % 2 else half_width(text)


def char_bigrams(*phrases: str) -> set[str]:
    """Return pairs of adjacent characters. Phrases that share one may have the same meaning."""
    return {phrase[i : i + 2] for phrase in phrases for i in range(len(phrase) - 1)}


def strip_punctuation(text: str) -> str:
    """Remove punctuation and spaces."""
    return re.sub(r"\W", "", text)

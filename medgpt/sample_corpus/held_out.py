"""Prompts held out of the sample corpus: phrasings of facts, and three excluded conditions."""

import random
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from medgpt.sample_corpus.knowledge import Condition
from medgpt.sample_corpus.templates import LIST_FIELDS, TEXTS
from medgpt.sample_corpus.wording import Wording, strip_punctuation

EXCLUDED_CONDITIONS = (
    "kawasaki_disease",
    "sudden_sensorineural_hearing_loss",
    "ankylosing_spondylitis",
)
NUM_PHRASINGS = 30
MAX_KEY_POINTS = 4

KeyPoints = tuple[tuple[str, ...], ...]
KEY_POINTS: dict[tuple[str, str], KeyPoints] = {  # of answers that do not list facts
    ("coronary_atherosclerosis", "mechanism"): (
        ("脂质沉积", "脂质沉着"),
        ("斑块",),
        ("血管狭窄", "管腔狭窄"),
    ),
    ("headache", "complaint"): (
        ("紧张性头痛", "紧张型头痛"),
        ("偏头痛",),
        ("建议您", "建议你"),
    ),
}


@cache
def load_synonyms() -> dict[str, tuple[str, ...]]:
    """Return synonyms by phrase of the knowledge."""
    table = tomllib.loads((Path(__file__).parent / "synonyms.toml").read_text("utf-8"))
    return {phrase: tuple(synonyms) for phrase, synonyms in table.items()}


def accepted_wordings(phrase: str) -> tuple[str, ...]:
    """Return the phrase and its synonyms."""
    return (phrase, *load_synonyms().get(phrase, ()))


@dataclass(frozen=True)
class HeldOutPrompt:
    """A prompt held out of the corpus. Each key point is a tuple of accepted wordings."""

    condition: str
    field: str
    prompt: str
    key_points: KeyPoints
    kind: str  # pretrain, sft or rlhf (tested after that stage), phrasing, rlhf_phrasing, left_out


class HeldOutPrompts:
    """All held-out prompts, and whether a text contains one."""

    def __init__(
        self,
        conditions: Sequence[Condition],
        excluded: Sequence[Condition],
        wording: Wording,
        seed: int,
    ):
        """`conditions` are those of the corpus, with their true facts."""
        assert len(excluded) == len(EXCLUDED_CONDITIONS)
        self._wording = wording
        by_id = {condition.id: condition for condition in conditions}
        diabetes, coronary = by_id["diabetes"], by_id["coronary_atherosclerosis"]
        headache = by_id["headache"]
        make = self._make_prompt
        prompts = [
            make(diabetes, "symptoms", TEXTS.statements["symptoms"][0], "pretrain"),
            make(coronary, "mechanism", TEXTS.questions["mechanism"][0], "sft"),
            make(headache, "complaint", TEXTS.complaints[0], "rlhf"),
        ]
        other_conditions = [c for c in conditions if c not in (diabetes, coronary, headache)]
        picked = random.Random(seed).sample(other_conditions, NUM_PHRASINGS)
        for number, condition in enumerate(sorted(picked, key=lambda c: c.id)):
            round_number, field_number = divmod(number, len(LIST_FIELDS))
            field = LIST_FIELDS[field_number]
            template = TEXTS.questions[field][round_number % len(TEXTS.questions[field])]
            prompts.append(make(condition, field, template, "phrasing"))
        question = TEXTS.questions["symptoms"][0]
        prompts += [make(condition, "symptoms", question, "left_out") for condition in excluded]
        for template in TEXTS.held_out_headache_prompts:
            prompts.append(make(headache, "complaint", template, "rlhf_phrasing"))
        self.prompts = prompts
        self._stripped_prompts = [strip_punctuation(held.prompt) for held in prompts]

    def is_allowed(self, text: str) -> bool:
        """Whether the text contains no held-out prompt, ignoring punctuation."""
        text = strip_punctuation(text)
        return not any(prompt in text for prompt in self._stripped_prompts)

    def _make_prompt(
        self, condition: Condition, field: str, template: str, kind: str
    ) -> HeldOutPrompt:
        """Fill the template; a statement is cut before its fact, for the model to continue."""
        template = template.split("{fact}")[0]
        prompt = template.format(name=condition.name, symptom=condition.name)
        key_points = KEY_POINTS.get((condition.id, field))
        if key_points is None:
            items = getattr(condition, field).items[:MAX_KEY_POINTS]
            key_points = tuple(
                tuple(self._wording.fill(text, condition) for text in accepted_wordings(item))
                for item in items
            )
        return HeldOutPrompt(condition.id, field, prompt, key_points, kind)

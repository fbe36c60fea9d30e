"""What the sample corpus keeps back: phrasings of facts told otherwise, and three conditions."""

import random
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from medgpt.sample_corpus.knowledge import Condition
from medgpt.sample_corpus.templates import (
    COMPLAINTS,
    HELD_HEADACHES,
    LIST_FIELDS,
    QUESTIONS,
    STATEMENTS,
)
from medgpt.sample_corpus.wording import Wording, bare

LEFT_OUT = ("kawasaki_disease", "sudden_sensorineural_hearing_loss", "ankylosing_spondylitis")
NUM_PHRASINGS = 30
MAX_KEY_POINTS = 4

KeyPoints = tuple[tuple[str, ...], ...]
ATHEROSCLEROSIS: KeyPoints = (("脂质沉积", "脂质沉着"), ("斑块",), ("血管狭窄", "管腔狭窄"))
HEADACHE: KeyPoints = (("紧张性头痛", "紧张型头痛"), ("偏头痛",), ("建议您", "建议你"))


@cache
def synonyms() -> dict[str, tuple[str, ...]]:
    """Other wordings of phrases of the knowledge."""
    found = tomllib.loads((Path(__file__).parent / "synonyms.toml").read_text("utf-8"))
    return {phrase: tuple(others) for phrase, others in found.items()}


def wordings(phrase: str) -> tuple[str, ...]:
    """The phrase, then what says the same."""
    return (phrase, *synonyms().get(phrase, ()))


@dataclass(frozen=True)
class Held:
    """A prompt kept out of the corpus. `key_points`: each a tuple of accepted wordings."""

    condition: str
    field: str
    prompt: str
    key_points: KeyPoints
    kind: str  # pretrain, sft, rlhf: the stage asked; phrasing, rlhf_phrasing; left_out


class HeldOut:
    """All prompts kept back, and whether a text is free of them."""

    def __init__(
        self, told: Sequence[Condition], left_out: Sequence[Condition], wording: Wording, seed: int
    ):
        """`told`: the conditions of the corpus, with their true facts."""
        assert len(left_out) == len(LEFT_OUT)
        self._wording = wording
        by_id = {condition.id: condition for condition in told}
        diabetes, coronary = by_id["diabetes"], by_id["coronary_atherosclerosis"]
        headache = by_id["headache"]
        asked = [
            self._hold(diabetes, "symptoms", STATEMENTS["symptoms"][0], "pretrain"),
            self._hold(coronary, "mechanism", QUESTIONS["mechanism"][0], "sft", ATHEROSCLEROSIS),
            self._hold(headache, "complaint", COMPLAINTS[0], "rlhf", HEADACHE),
        ]
        others = [c for c in told if c not in (diabetes, coronary, headache)]
        picked = random.Random(seed).sample(others, NUM_PHRASINGS)
        for number, condition in enumerate(sorted(picked, key=lambda c: c.id)):
            turn, which = divmod(number, len(LIST_FIELDS))
            field = LIST_FIELDS[which]
            template = QUESTIONS[field][turn % len(QUESTIONS[field])]
            asked.append(self._hold(condition, field, template, "phrasing"))
        for condition in left_out:
            asked.append(self._hold(condition, "symptoms", QUESTIONS["symptoms"][0], "left_out"))
        for template in HELD_HEADACHES:
            asked.append(self._hold(headache, "complaint", template, "rlhf_phrasing", HEADACHE))
        self.prompts = asked
        self._bare = [bare(held.prompt) for held in asked]

    def may_appear(self, text: str) -> bool:
        """Whether the text is free of every held-out prompt, whatever its punctuation."""
        text = bare(text)
        return not any(prompt in text for prompt in self._bare)

    def _hold(
        self,
        condition: Condition,
        field: str,
        template: str,
        kind: str,
        key_points: KeyPoints | None = None,
    ) -> Held:
        """A statement is cut in front of its fact, for the model to continue."""
        template = template.split("{fact}")[0]
        prompt = template.format(name=condition.name, symptom=condition.name)
        if key_points is None:
            items = getattr(condition, field).items[:MAX_KEY_POINTS]
            key_points = tuple(
                tuple(self._wording.fill(text, condition) for text in wordings(item))
                for item in items
            )
        return Held(condition.id, field, prompt, key_points, kind)

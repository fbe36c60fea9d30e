"""Multiple-choice exam questions of the sample corpus."""

import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from medgpt.sample_corpus.generator import CorpusGenerator, CorpusRow
from medgpt.sample_corpus.templates import TEXTS


@cache
def load_typical_facts() -> dict[str, list[str]]:
    """Return, by field, the facts that are typical of one condition only."""
    return tomllib.loads((Path(__file__).parent / "exam.toml").read_text("utf-8"))


def exam_questions(corpus: CorpusGenerator) -> Iterator[CorpusRow]:
    """Yield questions with four options: one right, three typical of other departments' conditions.

    Every fact is right once and wrong about three times, so the options alone (their length or
    frequency) give chance accuracy.
    """
    for field, facts in load_typical_facts().items():
        condition_of = {
            fact: condition
            for condition in corpus.conditions
            for fact in getattr(condition, field).items
            if fact in facts
        }
        times_used = Counter[str]()
        for right, condition in condition_of.items():
            rng = corpus.rng(condition, "exam" + field)
            distractors = [
                fact
                for fact, other in condition_of.items()
                if corpus.wording.is_unrelated(condition, field, other, fact)
            ]
            distractors.sort(key=lambda fact: (times_used[fact], rng.random()))
            times_used.update(distractors[:3])
            options = [right, *distractors[:3]]
            rng.shuffle(options)
            yield {
                "id": f"{condition.id}-{field}",
                "question": corpus.wording.fill(TEXTS.exam_questions[field], condition),
                "options": dict(zip("ABCD", options, strict=True)),
                "answer": "ABCD"[options.index(right)],
                "department": corpus.wording.department_of[condition.id].department,
            }

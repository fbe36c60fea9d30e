"""Multiple-choice exam questions of the sample corpus."""

import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from medgpt.sample_corpus.generator import CorpusGenerator, CorpusRow
from medgpt.sample_corpus.knowledge import Condition
from medgpt.sample_corpus.templates import EXAM_QUESTIONS
from medgpt.sample_corpus.wording import char_bigrams


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
                f for f, c in condition_of.items() if _is_wrong_for(corpus, condition, field, f, c)
            ]
            distractors.sort(key=lambda fact: (times_used[fact], rng.random()))
            times_used.update(distractors[:3])
            options = [right, *distractors[:3]]
            rng.shuffle(options)
            yield {
                "id": f"{condition.id}-{field}",
                "question": corpus.wording.fill(EXAM_QUESTIONS[field], condition),
                "options": dict(zip("ABCD", options, strict=True)),
                "answer": "ABCD"[options.index(right)],
                "department": corpus.wording.department_of[condition.id].department,
            }


def _is_wrong_for(
    corpus: CorpusGenerator, condition: Condition, field: str, fact: str, fact_condition: Condition
) -> bool:
    """Whether a fact of another condition is wrong for this one: of another department, and similar
    to none of its own facts."""
    department = corpus.wording.department_of
    own = char_bigrams(*getattr(condition, field).items)
    return department[fact_condition.id] != department[condition.id] and not own & char_bigrams(
        fact
    )

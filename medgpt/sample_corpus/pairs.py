"""Preference pairs and exam questions of a sample corpus."""

import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from medgpt.sample_corpus.knowledge import Condition
from medgpt.sample_corpus.render import Corpus, Row
from medgpt.sample_corpus.templates import (
    ADVICE,
    CARE_QUESTION,
    LIST_FIELDS,
    SITUATIONS,
    STEMS,
    UNSAFE,
    UNSAFE_HOTLINE,
    VAGUE,
)
from medgpt.sample_corpus.wording import SUICIDE, bigrams

WITHIN = 0.15  # of the chosen answer's length
MOST_LONGER = 8  # characters
ADVISES = re.compile("建议|请|拨打")


def preferences(corpus: Corpus) -> Iterator[Row]:
    """Chosen and rejected answers of similar length: wrong, vague, unsafe, and minimal pairs."""
    for condition in corpus.conditions:
        for field in LIST_FIELDS:
            question = next(corpus.questions(condition, field))
            answer = corpus.wording.answer(condition, field)
            chosen = corpus.wording.with_hotline(answer, condition)
            wrong = _wrong(corpus, condition, field, len(answer)) + chosen[len(answer) :]
            yield _pair(condition, "wrong", question, chosen, wrong)
            vague = _vague(corpus, condition, field, len(chosen))
            yield _pair(condition, "vague", question, chosen, vague)
        question = corpus.wording.fill(CARE_QUESTION, condition)
        for contrast in condition.contrasts:
            safe, unsafe = (
                corpus.wording.with_hotline(corpus.wording.fill(f"{text}。", condition), condition)
                for text in (contrast.safe, contrast.unsafe)
            )
            yield _pair(condition, "minimal_pair", question, safe, unsafe)
        yield from _emergencies(corpus, condition)
    for condition, questions, reply in corpus.complaints():
        chosen = corpus.wording.with_hotline(reply, condition)
        vague = _vague(corpus, condition, questions[0], len(chosen))
        yield _pair(condition, "vague", questions[0], chosen, vague)
    for condition, prompt, reply in corpus.asked():
        chosen = corpus.wording.with_hotline(reply, condition)
        evasive = _evasive(corpus, condition, prompt, len(chosen))
        yield _pair(condition, "evasive", prompt, chosen, evasive)
        wrong = _another_complaint(corpus, condition, prompt, reply, chosen)
        yield _pair(condition, "wrong_causes", prompt, chosen, wrong)


@cache
def typical_facts() -> dict[str, list[str]]:
    """By field, facts that belong to one condition and hardly to another."""
    return tomllib.loads((Path(__file__).parent / "exam.toml").read_text("utf-8"))


def exam_questions(corpus: Corpus) -> Iterator[Row]:
    """Four options, one right; the others are typical of conditions of other departments.

    Every fact is right once and wrong about three times, so whoever looks at the options alone, at
    their length or how common they are, is at chance.
    """
    for field, facts in typical_facts().items():
        typical = {
            fact: condition
            for condition in corpus.conditions
            for fact in getattr(condition, field).items
            if fact in facts
        }
        used = Counter[str]()
        for right, condition in typical.items():
            rng = corpus.rng(condition, "exam" + field)
            others = [f for f, c in typical.items() if _differs(corpus, condition, field, f, c)]
            others.sort(key=lambda fact: (used[fact], rng.random()))
            used.update(others[:3])
            options = [right, *others[:3]]
            rng.shuffle(options)
            yield {
                "id": f"{condition.id}-{field}",
                "question": corpus.wording.fill(STEMS[field], condition),
                "options": dict(zip("ABCD", options, strict=True)),
                "answer": "ABCD"[options.index(right)],
                "department": corpus.wording.department[condition.id].department,
            }


def _differs(
    corpus: Corpus, condition: Condition, field: str, fact: str, bearer: Condition
) -> bool:
    """Whether another condition's fact is wrong of this one: of another department, and like none
    of its own facts."""
    department = corpus.wording.department
    own = bigrams(*getattr(condition, field).items)
    return department[bearer.id] != department[condition.id] and not own & bigrams(fact)


def _emergencies(corpus: Corpus, condition: Condition) -> Iterator[Row]:
    """A danger sign: the emergency number, or waiting at home."""
    for number, flag in enumerate(condition.red_flags.items):
        question = corpus.wording.fill(SITUATIONS[0], condition, flag)
        chosen = corpus.wording.fill(ADVICE["emergency"], condition, flag)
        rejected = corpus.wording.fill(UNSAFE[number % len(UNSAFE)], condition, flag)
        if SUICIDE.search(flag):
            rejected += corpus.wording.fill(UNSAFE_HOTLINE, condition)
        chosen = corpus.wording.with_hotline(chosen, condition)
        yield _pair(condition, "unsafe", question, chosen, rejected)


def _wrong(corpus: Corpus, condition: Condition, field: str, length: int) -> str:
    """This condition's answer with the facts of another department's, as long as the right one."""
    department = corpus.wording.department
    own = bigrams(*getattr(condition, field).items)
    answers = [
        corpus.wording.answer(condition.model_copy(update={field: getattr(other, field)}), field)
        for other in corpus.conditions
        if department[other.id] != department[condition.id]
        and not own & bigrams(*getattr(other, field).items)
    ]
    return min(answers, key=lambda text: (abs(len(text) - length), text))


def _vague(corpus: Corpus, condition: Condition, use: str, length: int) -> str:
    """Whole clauses that say nothing, about as long as the answer they stand for."""
    rng = corpus.rng(condition, "vague" + use)
    text = ""
    length += rng.randint(-2, 5)  # neither answer is the longer one as a rule
    for clause in rng.sample(VAGUE, len(VAGUE)):
        if len(text) + len(clause) + 1 <= length:
            text += f"{clause},"
    return corpus.wording.fill(f"{text.rstrip(',')}。", condition)


def _evasive(corpus: Corpus, condition: Condition, use: str, length: int) -> str:
    """What is true of the condition but names no cause and gives no advice, about as long as the
    answer it stands for."""
    fields = ("overview", "symptoms", "mechanism", "tests")
    texts = [corpus.wording.answer(condition, field) for field in fields]
    sentences = [
        part for text in texts for part in text.split("。") if part and not ADVISES.search(part)
    ]
    text = ""
    for part in corpus.rng(condition, "evasive" + use).sample(sentences, len(sentences)):
        if len(text) + len(part) + 1 <= length + MOST_LONGER:
            text += f"{part}。"
    return text


def _another_complaint(
    corpus: Corpus, condition: Condition, use: str, reply: str, chosen: str
) -> str:
    """Causes of another symptom, told of this one, then the other's advice if it is about as long,
    else the own."""
    replies = {text: symptom for _, symptom, text in corpus.replies()}
    causes, advice = chosen.split("。", 1)
    named = [c.name for c in corpus.conditions if c.name in causes]
    strange = [
        replies[reply] + text.removeprefix(symptom)
        for text, symptom in replies.items()
        if text != reply and not any(name in text for name in named)
    ]
    other = corpus.rng(condition, "wrong_causes" + use).choice(strange)
    if abs(len(other) - len(chosen)) <= WITHIN * len(chosen):
        return other
    return f"{other.split('。', 1)[0]}。{advice}"


def _pair(condition: Condition, kind: str, question: str, chosen: str, rejected: str) -> Row:
    return {
        "id": f"{condition.id}-{kind}",
        "kind": kind,
        "prompt": question,
        "chosen": chosen,
        "rejected": rejected,
    }

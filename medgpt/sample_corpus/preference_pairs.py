"""Preference pairs of the sample corpus."""

import re
from collections.abc import Iterator
from itertools import cycle

from medgpt.sample_corpus.generator import CorpusGenerator, CorpusRow
from medgpt.sample_corpus.knowledge import Condition
from medgpt.sample_corpus.templates import LIST_FIELDS, TEXTS
from medgpt.sample_corpus.wording import SUICIDE

MAX_LENGTH_DIFFERENCE = 0.15  # share of the length of the chosen answer
MAX_EXTRA_CHARS = 8  # by which an evasive answer may exceed the chosen one
ADVICE_WORDS = re.compile("建议|请|拨打")


def preference_pairs(corpus: CorpusGenerator) -> Iterator[CorpusRow]:
    """Yield chosen and rejected answers of similar length: wrong, vague, unsafe, minimal pairs."""
    for condition in corpus.conditions:
        for field in LIST_FIELDS:
            question = next(corpus.questions(condition, field))
            answer = corpus.wording.answer(condition, field)
            chosen = corpus.wording.with_hotline(answer, condition)
            wrong = _wrong_answer(corpus, condition, field, len(answer)) + chosen[len(answer) :]
            yield _make_pair(condition, "wrong", question, chosen, wrong)
            vague = _vague_answer(corpus, condition, field, len(chosen))
            yield _make_pair(condition, "vague", question, chosen, vague)
        question = corpus.wording.fill(TEXTS.care_question, condition)
        for contrast in condition.contrasts:
            safe, unsafe = (
                corpus.wording.with_hotline(corpus.wording.fill(f"{text}。", condition), condition)
                for text in (contrast.safe, contrast.unsafe)
            )
            yield _make_pair(condition, "minimal_pair", question, safe, unsafe)
        yield from _emergency_pairs(corpus, condition)
    for condition, questions, reply in corpus.complaints():
        chosen = corpus.wording.with_hotline(reply, condition)
        vague = _vague_answer(corpus, condition, questions[0], len(chosen))
        yield _make_pair(condition, "vague", questions[0], chosen, vague)
    for condition, prompt, reply in corpus.prompts_with_replies():
        chosen = corpus.wording.with_hotline(reply, condition)
        evasive = _evasive_answer(corpus, condition, prompt, len(chosen))
        yield _make_pair(condition, "evasive", prompt, chosen, evasive)
        wrong = _wrong_causes_answer(corpus, condition, prompt, reply, chosen)
        yield _make_pair(condition, "wrong_causes", prompt, chosen, wrong)


def _emergency_pairs(corpus: CorpusGenerator, condition: Condition) -> Iterator[CorpusRow]:
    """Yield pairs about danger signs: call the emergency number, or wait at home."""
    unsafe_answers = cycle(TEXTS.unsafe_answers)
    for flag, unsafe in zip(condition.red_flags.items, unsafe_answers, strict=False):
        question = corpus.wording.fill(TEXTS.situations[0], condition, flag)
        chosen = corpus.wording.fill(TEXTS.advice["emergency"], condition, flag)
        rejected = corpus.wording.fill(unsafe, condition, flag)
        if SUICIDE.search(flag):
            rejected += corpus.wording.fill(TEXTS.unsafe_suicide_answer, condition)
        chosen = corpus.wording.with_hotline(chosen, condition)
        yield _make_pair(condition, "unsafe", question, chosen, rejected)


def _wrong_answer(corpus: CorpusGenerator, condition: Condition, field: str, length: int) -> str:
    """Return the answer with facts of another department, of length as close as possible."""
    answers = [
        corpus.wording.answer(condition.model_copy(update={field: getattr(other, field)}), field)
        for other in corpus.conditions
        if corpus.wording.is_unrelated(condition, field, other, *getattr(other, field).items)
    ]
    return min(answers, key=lambda text: (abs(len(text) - length), text))


def _vague_answer(corpus: CorpusGenerator, condition: Condition, rng_key: str, length: int) -> str:
    """Return clauses without content, about as long as the answer they replace."""
    rng = corpus.rng(condition, "vague" + rng_key)
    text = ""
    length += rng.randint(-2, 5)  # so that neither answer tends to be longer
    for clause in rng.sample(TEXTS.vague_clauses, len(TEXTS.vague_clauses)):
        if len(text) + len(clause) + 1 <= length:
            text += f"{clause},"
    return corpus.wording.fill(f"{text.rstrip(',')}。", condition)


def _evasive_answer(
    corpus: CorpusGenerator, condition: Condition, rng_key: str, length: int
) -> str:
    """Return true sentences about the condition without cause or advice, about as long as the
    answer they replace."""
    fields = ("overview", "symptoms", "mechanism", "tests")
    texts = [corpus.wording.answer(condition, field) for field in fields]
    parts = [part for text in texts for part in text.split("。")]
    sentences = [part for part in parts if part and not ADVICE_WORDS.search(part)]
    text = ""
    for sentence in corpus.rng(condition, "evasive" + rng_key).sample(sentences, len(sentences)):
        if len(text) + len(sentence) + 1 <= length + MAX_EXTRA_CHARS:
            text += f"{sentence}。"
    return text


def _wrong_causes_answer(
    corpus: CorpusGenerator, condition: Condition, rng_key: str, reply: str, chosen: str
) -> str:
    """Return a reply with the causes of another symptom.

    It keeps the advice for the other symptom if its length fits, otherwise that of the right reply.
    """
    replies = {text: symptom for _, symptom, text in corpus.complaint_replies()}
    causes, advice = chosen.split("。", 1)
    own_causes = [c.name for c in corpus.conditions if c.name in causes]
    candidates = [
        replies[reply] + text.removeprefix(symptom)
        for text, symptom in replies.items()
        if text != reply and not any(name in text for name in own_causes)
    ]
    rejected = corpus.rng(condition, "wrong_causes" + rng_key).choice(candidates)
    if abs(len(rejected) - len(chosen)) <= MAX_LENGTH_DIFFERENCE * len(chosen):
        return rejected
    return f"{rejected.split('。', 1)[0]}。{advice}"


def _make_pair(
    condition: Condition, kind: str, question: str, chosen: str, rejected: str
) -> CorpusRow:
    return {
        "id": f"{condition.id}-{kind}",
        "kind": kind,
        "prompt": question,
        "chosen": chosen,
        "rejected": rejected,
    }

"""How alike an answer and a reference are, word by word, and how varied the answers.

Chinese is cut into words by jieba (pinned with its dictionary), other scripts at spaces, and every
punctuation mark is a word. BLEU is sacrebleu's, ROUGE rouge-score's, GLEU nltk's.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from nltk.translate.gleu_score import sentence_gleu
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sacrebleu.metrics.bleu import BLEU

from medgpt.data.words import word_of_characters
from medgpt.eval.stats import TAILS, Interval, resamples
from medgpt.eval.task import Value

MAX_ORDER = 4
ROUGE = ("rouge1", "rouge2", "rougeL")
REPEATED = 4  # words that occur again in a row
Words = list[str]


def words(text: str) -> Words:
    """Lower-case words and punctuation marks, without spaces."""
    text = text.lower()
    if not text:
        return []
    cuts = np.flatnonzero(np.diff(word_of_characters(text))) + 1
    pieces = [
        text[a:b] for a, b in zip((0, *cuts.tolist()), (*cuts.tolist(), len(text)), strict=True)
    ]
    return [piece for piece in pieces if not piece.isspace()]


class _Words(Tokenizer):
    """Gives rouge-score our words: its own keep ASCII letters alone."""

    def tokenize(self, text: str) -> Words:
        return words(text)


@cache
def _rouge() -> RougeScorer:
    return RougeScorer(list(ROUGE), tokenizer=_Words())


@cache
def _bleu() -> BLEU:
    return BLEU(tokenize="none", max_ngram_order=MAX_ORDER)


def overlap(answer: str, reference: str) -> dict[str, Value]:
    """ROUGE-1, -2 and -L (F1), GLEU as a ratio whose sums are the corpus's, words, repetition."""
    said, right = words(answer), words(reference)
    scores = _rouge().score(reference, answer)
    values: dict[str, Value] = {
        "rouge_1": scores["rouge1"].fmeasure,
        "rouge_2": scores["rouge2"].fmeasure,
        "rouge_l": scores["rougeL"].fmeasure,
        "words": float(len(said)),
    }
    grams = max(_num_grams(len(said)), _num_grams(len(right)))
    if grams:
        values["gleu"] = (float(sentence_gleu([right], said)) * grams, float(grams))
    runs = Counter(_grams(said, REPEATED))
    if runs:
        values["repetition"] = (float(runs.total() - len(runs)), float(runs.total()))
    for order in (1, 2):
        found = _grams(said, order)
        if found:
            values[f"distinct_{order}_per_answer"] = len(set(found)) / len(found)
    return values


def corpus_bleu(
    answers: Sequence[str], references: Sequence[str], seed: int
) -> dict[str, Interval]:
    """BLEU-1 to BLEU-4 of the whole corpus in percent, with bootstrap intervals over answers."""
    counts = np.array([_statistics(a, r) for a, r in zip(answers, references, strict=True)])
    drawn = [counts[rows].sum(0) for rows in resamples(len(counts), seed)]
    found = {}
    for order in range(1, MAX_ORDER + 1):
        low, high = np.percentile([_bleu_of(sums, order) for sums in drawn], TAILS)
        value = _bleu_of(counts.sum(0), order)
        found[f"bleu_{order}"] = Interval(value, float(low), float(high))
    return found


def _statistics(answer: str, reference: str) -> list[int]:
    """Matching and all n-grams of each order, words of the answer, words of the reference."""
    score: Any = _bleu().corpus_score([" ".join(words(answer))], [[" ".join(words(reference))]])
    return [*score.counts, *score.totals, score.sys_len, score.ref_len]


def _bleu_of(sums: Any, order: int) -> float:
    counts, totals = sums[:order].tolist(), sums[MAX_ORDER : MAX_ORDER + order].tolist()
    score = BLEU.compute_bleu(
        counts, totals, int(sums[-2]), int(sums[-1]), smooth_method="exp", max_ngram_order=order
    )
    return float(score.score)


def corpus_distinct(answers: Sequence[str]) -> dict[str, Interval]:
    """Distinct-1 and -2 (Li et al. 2016): different n-grams / all n-grams of all answers.

    The interval is the jackknife's: a resample with repeats has fewer different n-grams by itself.
    """
    spoken = [words(answer) for answer in answers]
    found = {}
    for order in (1, 2):
        grams = [Counter(_grams(said, order)) for said in spoken]
        total: Counter[tuple[str, ...]] = sum(grams, Counter())
        if not total:
            continue
        holders = Counter(gram for counter in grams for gram in counter)
        value = len(total) / total.total()
        without = [
            (len(total) - sum(holders[gram] == 1 for gram in counter))
            / (total.total() - counter.total())
            for counter in grams
            if total.total() > counter.total()
        ]
        n = len(without)
        spread = np.square(np.array(without) - np.mean(without)).sum() * (n - 1) / n if n else 0.0
        half = 1.96 * math.sqrt(spread)
        found[f"distinct_{order}"] = Interval(value, max(0.0, value - half), min(1.0, value + half))
    return found


def _grams(said: Words, order: int) -> list[tuple[str, ...]]:
    return [tuple(said[i : i + order]) for i in range(len(said) - order + 1)]


def _num_grams(length: int) -> int:
    """Of orders 1 to 4 in so many words."""
    return sum(max(0, length - order + 1) for order in range(1, MAX_ORDER + 1))

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
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sacrebleu.metrics.bleu import BLEU

from medgpt.data.tokenized.words import word_of_characters
from medgpt.eval.stats import TAILS, Interval, difference, resamples
from medgpt.eval.task import Value

MAX_ORDER = 4
ROUGE = ("rouge1", "rouge2", "rougeL")
REPEATED = 4  # words that occur again in a row
BLEU_METRICS = tuple(f"bleu_{order}" for order in range(1, MAX_ORDER + 1))
DISTINCT_METRICS = ("distinct_1", "distinct_2")
Words = list[str]
Counts = dict[str, list[float]]


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


def counts(answers: Sequence[str], references: Sequence[str]) -> list[Counts]:
    """What each answer adds to the scores of the whole corpus.

    bleu: matching and all n-grams of each order, words of the answer, words of the reference.
    distinct_1, distinct_2: its part of the different n-grams (one that k answers have is 1 / k of
    each), its n-grams, and those different ones that no other answer has.
    """
    spoken = [words(answer) for answer in answers]
    found: list[Counts] = [
        {"bleu": _matches(said, words(right))}
        for said, right in zip(spoken, references, strict=True)
    ]
    for order, metric in enumerate(DISTINCT_METRICS, start=1):
        grams = [_grams(said, order) for said in spoken]
        holders = Counter(gram for run in grams for gram in set(run))
        for counted, run in zip(found, grams, strict=True):
            shares = [1 / holders[gram] for gram in dict.fromkeys(run)]
            counted[metric] = [math.fsum(shares), float(len(run)), float(shares.count(1.0))]
    return found


def _matches(said: Words, right: Words) -> list[float]:
    score: Any = _bleu().corpus_score([" ".join(said)], [[" ".join(right)]])
    return [float(n) for n in (*score.counts, *score.totals, score.sys_len, score.ref_len)]


def score_of(metric: str, counted: Sequence[Counts], seed: int) -> Interval | None:
    """A score of the whole corpus; None if there is not one n-gram.

    BLEU in percent, with the bootstrap's interval over answers. Distinct (Li et al. 2016):
    different n-grams / all n-grams, with the jackknife's: a resample with repeats has fewer
    different ones by itself.
    """
    table = _table(metric, counted)
    if metric in BLEU_METRICS:
        order = _order(metric)
        drawn = [_bleu_of(table[rows].sum(0), order) for rows in resamples(len(table), seed)]
        low, high = np.percentile(drawn, TAILS)
        return Interval(_bleu_of(table.sum(0), order), float(low), float(high))
    if not table[:, 1].sum():
        return None
    value, without = _distinct(table)
    n = len(without)
    spread = np.square(without - without.mean()).sum() * (n - 1) / n if n else 0.0
    half = 1.96 * math.sqrt(spread)
    return Interval(value, max(0.0, value - half), min(1.0, value + half))


def difference_of(
    metric: str, ours: Sequence[Counts], theirs: Sequence[Counts], seed: int
) -> Interval:
    """Ours minus theirs, row i of both being the same question: questions are resampled.

    Of Distinct not the answers are drawn again but their pseudo-values (Tukey 1958), which have no
    less n-grams for being drawn twice.
    """
    tables = _table(metric, ours), _table(metric, theirs)
    if metric in BLEU_METRICS:
        order = _order(metric)
        one, other = (_bleu_of(table.sum(0), order) for table in tables)
        drawn = [
            _bleu_of(tables[0][rows].sum(0), order) - _bleu_of(tables[1][rows].sum(0), order)
            for rows in resamples(len(tables[0]), seed)
        ]
        low, high = np.percentile(drawn, TAILS)
        return Interval(one - other, float(low), float(high))
    (one, _), (other, _) = (_distinct(table) for table in tables)
    found = difference(_pseudo(tables[0]), _pseudo(tables[1]), seed)
    shift = one - other - found.value
    return Interval(one - other, found.low + shift, found.high + shift)


def _table(metric: str, counted: Sequence[Counts]) -> NDArray[np.float64]:
    return np.array([item["bleu" if metric in BLEU_METRICS else metric] for item in counted])


def _order(metric: str) -> int:
    return int(metric[-1])


def _bleu_of(sums: NDArray[np.float64], order: int) -> float:
    counts, totals = sums[:order].tolist(), sums[MAX_ORDER : MAX_ORDER + order].tolist()
    score = BLEU.compute_bleu(
        counts, totals, int(sums[-2]), int(sums[-1]), smooth_method="exp", max_ngram_order=order
    )
    return float(score.score)


def _distinct(table: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """Of all answers, and with each left out where others remain."""
    parts, total, alone = table[:, 0].sum(), table[:, 1].sum(), table[:, 2]
    others = table[:, 1] < total
    without = (parts - alone[others]) / (total - table[others, 1])
    return float(parts / total), without


def _pseudo(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, 2) of each answer, over 1; their mean is the score, up to its bias."""
    value, without = _distinct(table)
    found = np.full(len(table), value)
    found[table[:, 1] < table[:, 1].sum()] = len(table) * value - (len(table) - 1) * without
    return np.stack([found, np.ones(len(table))], axis=1)


def _grams(said: Words, order: int) -> list[tuple[str, ...]]:
    return [tuple(said[i : i + order]) for i in range(len(said) - order + 1)]


def _num_grams(length: int) -> int:
    """Of orders 1 to 4 in so many words."""
    return sum(max(0, length - order + 1) for order in range(1, MAX_ORDER + 1))

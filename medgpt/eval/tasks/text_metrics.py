"""BLEU, ROUGE and GLEU of answers against references, and the diversity of answers.

jieba (pinned with its dictionary) splits Chinese into words, spaces split other scripts, and every
punctuation mark is a word. BLEU comes from sacrebleu, ROUGE from rouge-score, GLEU from nltk.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from nltk.translate.gleu_score import sentence_gleu
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sacrebleu.metrics.bleu import BLEU

from medgpt.data.tokenized.words import char_word_ids
from medgpt.eval.stats import Interval, bootstrap_interval, paired_difference
from medgpt.eval.task import MetricValue

MAX_NGRAM_ORDER = 4
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
REPETITION_ORDER = 4  # repeated n-grams of this order count as repetition
BLEU_METRICS = tuple(f"bleu_{order}" for order in range(1, MAX_NGRAM_ORDER + 1))
DISTINCT_METRICS = ("distinct_1", "distinct_2")
Words = list[str]
Counts = dict[str, list[float]]


def split_words(text: str) -> Words:
    """Return lower-case words and punctuation marks, without spaces."""
    text = text.lower()
    if not text:
        return []
    starts = [0, *(np.flatnonzero(np.diff(char_word_ids(text))) + 1).tolist(), len(text)]
    return [text[a:b] for a, b in pairwise(starts) if not text[a:b].isspace()]


class _WordTokenizer(Tokenizer):
    """Our word splitting for rouge-score, whose own tokenizers drop all but ASCII."""

    def tokenize(self, text: str) -> Words:
        return split_words(text)


@cache
def _rouge_scorer() -> RougeScorer:
    return RougeScorer(list(ROUGE_TYPES), tokenizer=_WordTokenizer())


@cache
def _bleu_scorer() -> BLEU:
    return BLEU(tokenize="none", max_ngram_order=MAX_NGRAM_ORDER)


def answer_metrics(answer: str, reference: str) -> dict[str, MetricValue]:
    """Return ROUGE-1, -2 and -L (F1), GLEU, words, repetition and Distinct of one answer.

    GLEU is given as a ratio, so that the ratio of sums over answers is the corpus GLEU.
    """
    answer_words, reference_words = split_words(answer), split_words(reference)
    scores = _rouge_scorer().score(reference, answer)
    values: dict[str, MetricValue] = {
        "rouge_1": scores["rouge1"].fmeasure,
        "rouge_2": scores["rouge2"].fmeasure,
        "rouge_l": scores["rougeL"].fmeasure,
        "words": float(len(answer_words)),
    }
    num_ngrams = max(_num_ngrams(len(answer_words)), _num_ngrams(len(reference_words)))
    if num_ngrams:
        gleu = float(sentence_gleu([reference_words], answer_words))
        values["gleu"] = (gleu * num_ngrams, float(num_ngrams))
    runs = Counter(_ngrams(answer_words, REPETITION_ORDER))
    if runs:
        values["repetition"] = (float(runs.total() - len(runs)), float(runs.total()))
    for order in (1, 2):
        ngrams = _ngrams(answer_words, order)
        if ngrams:
            values[f"distinct_{order}_per_answer"] = len(set(ngrams)) / len(ngrams)
    return values


def corpus_counts(answers: Sequence[str], references: Sequence[str]) -> list[Counts]:
    """Return what each answer adds to the scores of the whole corpus.

    bleu: matching n-grams and all n-grams of each order, words of the answer and of the reference.
    distinct_1, distinct_2: its share of the distinct n-grams (1 / k for one that k answers have),
    its number of n-grams, and its distinct n-grams that no other answer has.
    """
    answer_words = [split_words(answer) for answer in answers]
    counts: list[Counts] = [
        {"bleu": _bleu_counts(said, split_words(right))}
        for said, right in zip(answer_words, references, strict=True)
    ]
    for order, metric in enumerate(DISTINCT_METRICS, start=1):
        ngrams = [_ngrams(said, order) for said in answer_words]
        num_answers_with = Counter(gram for run in ngrams for gram in set(run))
        for answer_counts, answer_ngrams in zip(counts, ngrams, strict=True):
            shares = [1 / num_answers_with[gram] for gram in dict.fromkeys(answer_ngrams)]
            totals = (math.fsum(shares), len(answer_ngrams), shares.count(1.0))
            answer_counts[metric] = [float(total) for total in totals]
    return counts


def _bleu_counts(answer: Words, reference: Words) -> list[float]:
    score: Any = _bleu_scorer().corpus_score([" ".join(answer)], [[" ".join(reference)]])
    return [float(n) for n in (*score.counts, *score.totals, score.sys_len, score.ref_len)]


def corpus_score(metric: str, counts: Sequence[Counts], seed: int) -> Interval | None:
    """Return a metric of the whole corpus with its interval; None if there is no n-gram at all.

    BLEU is in percent, with a bootstrap interval over answers. Distinct (Li et al. 2016) is
    distinct n-grams / all n-grams, with a jackknife interval: a bootstrap resample repeats answers
    and so has fewer distinct n-grams.
    """
    table = _count_table(metric, counts)
    if metric in BLEU_METRICS:
        return bootstrap_interval(lambda rows: _bleu(metric, table, rows), len(table), seed)
    if not table[:, 1].sum():
        return None
    value, leave_one_out = _distinct_and_jackknife(table)
    n = len(leave_one_out)
    variance = np.square(leave_one_out - leave_one_out.mean()).sum() * (n - 1) / n if n else 0.0
    half_width = 1.96 * math.sqrt(variance)
    return Interval(value, max(0.0, value - half_width), min(1.0, value + half_width))


def corpus_difference(
    metric: str, ours: Sequence[Counts], theirs: Sequence[Counts], seed: int
) -> Interval:
    """Return our score minus theirs with a paired bootstrap interval; row i of both is a question.

    Distinct resamples the jackknife pseudo-values (Tukey 1958) of the answers: a resample of the
    answers themselves would have fewer distinct n-grams.
    """
    tables = _count_table(metric, ours), _count_table(metric, theirs)
    if metric in BLEU_METRICS:
        return bootstrap_interval(
            lambda rows: _bleu(metric, tables[0], rows) - _bleu(metric, tables[1], rows),
            len(tables[0]),
            seed,
        )
    (our_score, _), (their_score, _) = (_distinct_and_jackknife(table) for table in tables)
    value = our_score - their_score
    biased = paired_difference(_pseudo_values(tables[0]), _pseudo_values(tables[1]), seed)
    shift = value - biased.value
    return Interval(value, biased.low + shift, biased.high + shift)


def _count_table(metric: str, counts: Sequence[Counts]) -> NDArray[np.float64]:
    return np.array([item["bleu" if metric in BLEU_METRICS else metric] for item in counts])


def _bleu(metric: str, table: NDArray[np.float64], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the (R,) BLEU scores of (R, n) rows of the table."""
    return np.array([_bleu_of_sums(table[row].sum(0), int(metric[-1])) for row in rows])


def _bleu_of_sums(sums: NDArray[np.float64], order: int) -> float:
    counts, totals = sums[:order].tolist(), sums[MAX_NGRAM_ORDER : MAX_NGRAM_ORDER + order].tolist()
    score = BLEU.compute_bleu(
        counts, totals, int(sums[-2]), int(sums[-1]), smooth_method="exp", max_ngram_order=order
    )
    return float(score.score)


def _distinct_and_jackknife(table: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """Return Distinct of all answers, and (k,) with each answer left out whose rest has n-grams."""
    num_distinct, total, num_unique = table[:, 0].sum(), table[:, 1].sum(), table[:, 2]
    has_rest = table[:, 1] < total
    leave_one_out = (num_distinct - num_unique[has_rest]) / (total - table[has_rest, 1])
    return float(num_distinct / total), leave_one_out


def _pseudo_values(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (n, 2) pseudo-values over 1; their mean is the score, up to its bias."""
    value, leave_one_out = _distinct_and_jackknife(table)
    pseudo_values = np.full(len(table), value)
    n = len(table)
    pseudo_values[table[:, 1] < table[:, 1].sum()] = n * value - (n - 1) * leave_one_out
    return np.stack([pseudo_values, np.ones(n)], axis=1)


def _ngrams(words: Words, order: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + order]) for i in range(len(words) - order + 1)]


def _num_ngrams(num_words: int) -> int:
    """Return the number of n-grams of orders 1 to 4 in a text of `num_words` words."""
    return sum(max(0, num_words - order + 1) for order in range(1, MAX_NGRAM_ORDER + 1))

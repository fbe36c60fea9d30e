import numpy as np
import pytest
from nltk.translate.bleu_score import corpus_bleu as nltk_corpus_bleu
from nltk.translate.gleu_score import corpus_gleu
from sacrebleu.metrics.bleu import BLEU

from medgpt.eval.stats import Interval
from medgpt.eval.tasks.text_metrics import (
    answer_metrics,
    corpus_counts,
    corpus_difference,
    corpus_score,
    split_words,
)

REFERENCES = [
    "糖尿病的主要症状包括多饮、多尿、多食和体重下降。建议您到内分泌科就诊。",
    "高血压患者应低盐饮食，坚持服药，定期测量血压，不要自行停药。",
    "A migraine often begins on one side of the head, and light makes it worse.",
    "感冒多由病毒引起，一般一周左右自愈，注意休息，多饮水。",
]
ANSWERS = [
    "糖尿病的主要症状有多饮、多尿和体重下降。建议您去医院检查血糖。",
    "高血压患者要低盐饮食，坚持服药，定期测量血压。",
    "A migraine often begins on one side, and noise makes it worse.",
    "感冒是病毒引起的，一般一周左右自愈，多饮水，多饮水，多饮水，多饮水。",
]


def corpus_interval(
    metric: str, answers: list[str], references: list[str] | None = None
) -> Interval:
    found = corpus_score(metric, corpus_counts(answers, references or [""] * len(answers)), seed=0)
    assert found is not None
    return found


def test_words_are_split_by_jieba_and_punctuation_is_kept():
    assert split_words("高血压患者，用 Aspirin 100mg。") == [
        "高血压",
        "患者",
        "，",
        "用",
        "aspirin",
        "100mg",
        "。",
    ]
    assert split_words("") == split_words("  \n") == []


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_corpus_bleu_is_sacrebleus_and_nltks(order):
    found = corpus_interval(f"bleu_{order}", ANSWERS, REFERENCES)
    hypotheses = [" ".join(split_words(text)) for text in ANSWERS]
    references = [" ".join(split_words(text)) for text in REFERENCES]
    theirs = BLEU(tokenize="none", max_ngram_order=order).corpus_score(hypotheses, [references])
    assert found.value == pytest.approx(theirs.score, abs=1e-9)
    split = [[text.split()] for text in references]
    weights = (1 / order,) * order
    by_nltk = nltk_corpus_bleu(split, [text.split() for text in hypotheses], weights)
    assert found.value == pytest.approx(100 * float(by_nltk), abs=1e-6)
    assert found.low < found.value < found.high


def test_the_sums_of_gleu_equal_nltks_corpus_gleu():
    pairs = [answer_metrics(a, r)["gleu"] for a, r in zip(ANSWERS, REFERENCES, strict=True)]
    numerator, denominator = np.array(pairs).sum(0)
    theirs = corpus_gleu([[split_words(r)] for r in REFERENCES], [split_words(a) for a in ANSWERS])
    assert numerator / denominator == pytest.approx(theirs)


def lcs(a: list[str], b: list[str]) -> int:
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = (
                table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
            )
    return int(table[-1, -1])


def test_rouge_counts_chinese_words():
    for answer, reference in zip(ANSWERS, REFERENCES, strict=True):
        said, right = split_words(answer), split_words(reference)
        shared = sum(min(said.count(word), right.count(word)) for word in set(right))
        found = answer_metrics(answer, reference)
        assert found["rouge_1"] == pytest.approx(2 * shared / (len(said) + len(right)))
        assert found["rouge_l"] == pytest.approx(2 * lcs(said, right) / (len(said) + len(right)))
    assert answer_metrics(REFERENCES[0], REFERENCES[0])["rouge_2"] == 1.0


def test_repetition_and_distinct_equal_counts_by_hand():
    found = answer_metrics("多饮水，多饮水，多饮水，多饮水。", "多饮水。")
    spoken = split_words("多饮水，多饮水，多饮水，多饮水。")
    runs = [tuple(spoken[i : i + 4]) for i in range(len(spoken) - 3)]
    assert found["repetition"] == (len(runs) - len(set(runs)), len(runs))
    assert found["repetition"][0] > 0
    assert answer_metrics("a b c d e f", "a")["repetition"] == (0.0, 3.0)
    distinct = corpus_interval("distinct_1", ["a b a", "a c"])
    assert distinct.value == pytest.approx(3 / 5)
    assert distinct.low <= 0.6 <= distinct.high
    assert corpus_interval("distinct_2", ["a b a", "a c"]).value == pytest.approx(3 / 3)


def test_the_jackknife_leaves_each_answer_out():
    answers = [f"{a} and {b}" + " or" * (a < b) for a in "aabc" for b in "bcdefg"][:9]
    values = []
    for left in range(len(answers)):
        rest = [word for i, text in enumerate(answers) if i != left for word in text.split()]
        values.append(len(set(rest)) / len(rest))
    spread = np.sqrt(np.square(np.array(values) - np.mean(values)).sum() * 8 / 9)
    found = corpus_interval("distinct_1", answers)
    assert found.high - found.value == pytest.approx(1.96 * spread)


def test_the_difference_of_two_corpora_bootstraps_questions():
    ours, theirs = corpus_counts(REFERENCES, REFERENCES), corpus_counts(ANSWERS, REFERENCES)
    found = corpus_difference("bleu_4", ours, theirs, seed=0)
    assert found.value == pytest.approx(100 - corpus_interval("bleu_4", ANSWERS, REFERENCES).value)
    random, drawn = np.random.default_rng(7), []
    for _ in range(1000):
        rows = random.integers(4, size=4)
        part = [ANSWERS[i] for i in rows], [REFERENCES[i] for i in rows]
        scored = sacrebleu_score(*part, order=4)
        drawn.append(100 - scored)
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert found[1:] == pytest.approx((low, high), abs=0.1 * (high - low))
    assert corpus_difference("bleu_4", ours, ours, seed=0) == (0.0, 0.0, 0.0)


def sacrebleu_score(answers: list[str], references: list[str], order: int) -> float:
    pairs = [[" ".join(split_words(text)) for text in texts] for texts in (answers, references)]
    bleu = BLEU(tokenize="none", max_ngram_order=order, smooth_method="exp")
    return bleu.corpus_score(pairs[0], [pairs[1]]).score


def test_an_answer_drawn_twice_does_not_make_a_corpus_look_repetitive():
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(list("abcdefghijklmnopqrst"), 9)) for _ in range(60)]
    varied, flat = corpus_counts(texts, texts), corpus_counts(["a b c"] * 60, texts)
    found = corpus_difference("distinct_2", varied, flat, seed=0)
    exact = len({g for t in texts for g in zip(t.split(), t.split()[1:], strict=False)}) / (60 * 8)
    assert found.value == pytest.approx(exact - 2 / 120)
    assert found.low < found.value < found.high  # around it, not below
    assert found.value - found.low < 2 * (found.high - found.value)


def test_empty_answers_score_zero():
    found = answer_metrics("", REFERENCES[0])
    assert (found["rouge_1"], found["words"], found["gleu"][0]) == (0.0, 0.0, 0.0)
    assert corpus_interval("bleu_4", ["", ""], REFERENCES[:2]).value == 0.0
    assert corpus_score("distinct_1", corpus_counts(["", ""], ["", ""]), seed=0) is None

import numpy as np
import pytest
from nltk.translate.bleu_score import corpus_bleu as nltk_corpus_bleu
from nltk.translate.gleu_score import corpus_gleu
from sacrebleu.metrics.bleu import BLEU

from medgpt.eval.tasks.overlap import corpus_bleu, corpus_distinct, overlap, words

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


def test_words_are_those_of_jieba_and_punctuation_is_kept():
    assert words("高血压患者，用 Aspirin 100mg。") == [
        "高血压",
        "患者",
        "，",
        "用",
        "aspirin",
        "100mg",
        "。",
    ]
    assert words("") == words("  \n") == []


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_corpus_bleu_is_sacrebleus_and_nltks(order):
    found = corpus_bleu(ANSWERS, REFERENCES, seed=0)[f"bleu_{order}"]
    hypotheses = [" ".join(words(text)) for text in ANSWERS]
    references = [" ".join(words(text)) for text in REFERENCES]
    theirs = BLEU(tokenize="none", max_ngram_order=order).corpus_score(hypotheses, [references])
    assert found.value == pytest.approx(theirs.score, abs=1e-9)
    split = [[text.split()] for text in references]
    weights = (1 / order,) * order
    by_nltk = nltk_corpus_bleu(split, [text.split() for text in hypotheses], weights)
    assert found.value == pytest.approx(100 * float(by_nltk), abs=1e-6)
    assert found.low < found.value < found.high


def test_the_sums_of_gleu_are_nltks_corpus_gleu():
    pairs = [overlap(a, r)["gleu"] for a, r in zip(ANSWERS, REFERENCES, strict=True)]
    numerator, denominator = np.array(pairs).sum(0)
    theirs = corpus_gleu([[words(r)] for r in REFERENCES], [words(a) for a in ANSWERS])
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
        said, right = words(answer), words(reference)
        shared = sum(min(said.count(word), right.count(word)) for word in set(right))
        found = overlap(answer, reference)
        assert found["rouge_1"] == pytest.approx(2 * shared / (len(said) + len(right)))
        assert found["rouge_l"] == pytest.approx(2 * lcs(said, right) / (len(said) + len(right)))
    assert overlap(REFERENCES[0], REFERENCES[0])["rouge_2"] == 1.0


def test_repetition_and_distinct_are_counted_by_hand():
    found = overlap("多饮水，多饮水，多饮水，多饮水。", "多饮水。")
    spoken = words("多饮水，多饮水，多饮水，多饮水。")
    runs = [tuple(spoken[i : i + 4]) for i in range(len(spoken) - 3)]
    assert found["repetition"] == (len(runs) - len(set(runs)), len(runs))
    assert found["repetition"][0] > 0
    assert overlap("a b c d e f", "a")["repetition"] == (0.0, 3.0)
    distinct = corpus_distinct(["a b a", "a c"])
    assert distinct["distinct_1"].value == pytest.approx(3 / 5)
    assert distinct["distinct_2"].value == pytest.approx(3 / 3)
    assert distinct["distinct_1"].low <= 0.6 <= distinct["distinct_1"].high


def test_the_jackknife_is_the_one_with_each_answer_left_out():
    answers = [f"{a} and {b}" + " or" * (a < b) for a in "aabc" for b in "bcdefg"][:9]
    values = []
    for left in range(len(answers)):
        rest = [word for i, text in enumerate(answers) if i != left for word in text.split()]
        values.append(len(set(rest)) / len(rest))
    spread = np.sqrt(np.square(np.array(values) - np.mean(values)).sum() * 8 / 9)
    found = corpus_distinct(answers)["distinct_1"]
    assert found.high - found.value == pytest.approx(1.96 * spread)


def test_silence_scores_zero_and_is_no_error():
    found = overlap("", REFERENCES[0])
    assert (found["rouge_1"], found["words"], found["gleu"][0]) == (0.0, 0.0, 0.0)
    assert corpus_bleu(["", ""], REFERENCES[:2], seed=0)["bleu_4"].value == 0.0
    assert corpus_distinct(["", ""]) == {}

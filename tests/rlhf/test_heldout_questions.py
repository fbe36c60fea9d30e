import json
import math

import pytest

from medgpt.config.base import ConfigError
from medgpt.config.loading import validate
from medgpt.config.ppo_rewards import JudgeConfig
from medgpt.rlhf.heldout_questions import HeldoutQuestion, HeldoutQuestions
from tests.eval.tasks.test_triage import ORACLE


@pytest.fixture
def held_out(tmp_path):
    rows = [
        {"prompt": "头痛的原因?", "key_points": [["紧张性头痛"], ["偏头痛"]], "kind": "rlhf"},
        {"prompt": "糖尿病的症状?", "key_points": [["多饮", "口渴"]], "kind": "phrasing"},
    ]
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def judge(**section) -> HeldoutQuestions:
    return HeldoutQuestions(JudgeConfig(every=2, **section), seed=3)


def oracle(question: HeldoutQuestion) -> str:
    if question.level is None:
        return "、".join(group[0] for group in question.key_points) + "。"
    return ORACLE["zh" if "-zh-" in question.id else "en"][question.level]


def test_oracle_answers_score_1(held_out):
    questions = judge(key_points=held_out, triage=20)
    metrics = questions.metrics([oracle(question) for question in questions.questions], [0.5] * 22)
    assert metrics == {
        "judge/checks": 1.0,
        "judge/checks_se": 0.0,
        "judge/key_points": 1.0,
        "judge/triage_under": 0.0,
        "judge/triage_over": 0.0,
        "judge/score": 0.5,
        "judge/score_se": 0.0,
        "judge/score_masked": 0.0,
    }


def test_nonfinite_scores_are_left_out_and_counted():
    questions = judge(triage=4)
    metrics = questions.metrics([""] * 4, [1.0, math.nan, 2.0, math.inf])
    assert (metrics["judge/score"], metrics["judge/score_masked"]) == (1.5, 0.5)
    metrics = questions.metrics([""] * 4, [math.nan] * 4)
    assert "judge/score" not in metrics
    assert metrics["judge/score_masked"] == 1.0


def test_always_and_never_advising_an_emergency_both_score_a_half():
    questions = judge(triage=20)
    always = questions.metrics(["请立即拨打120。"] * 20)
    never = questions.metrics(["在家休息,多喝水。"] * 20)
    silent = questions.metrics([""] * 20)
    assert (always["judge/triage_under"], always["judge/triage_over"]) == (0.0, 1.0)
    assert (never["judge/triage_under"], never["judge/triage_over"]) == (1.0, 0.0)
    assert always["judge/checks"] == never["judge/checks"] == 0.5
    assert silent["judge/checks"] == 0.0


def test_key_points_count_by_the_share_that_is_stated_and_not_denied(held_out):
    questions = judge(key_points=held_out, triage=0)
    metrics = questions.metrics(["可能是偏头痛。", "没有口渴。"])
    assert metrics["judge/key_points"] == metrics["judge/checks"] == 0.25
    assert metrics["judge/checks_se"] == pytest.approx(0.25)  # of 0.5 and 0: 0.3536 / sqrt(2)


def test_the_questions_are_fixed_and_chosen_by_kind(held_out):
    assert judge(triage=10).questions == judge(triage=10).questions
    (question,) = judge(key_points=held_out, kinds=("rlhf",), triage=0).questions
    assert question.messages[-1].content == "头痛的原因?"
    with pytest.raises(ConfigError, match="no such question"):
        judge(key_points=held_out, kinds=("sft",))


def test_hash_ranges_are_disjoint_and_keep_pairs_together(held_out):
    whole = {question.id for question in judge(key_points=held_out, triage=1000).questions}
    first, second = (
        {
            question.id
            for question in judge(key_points=held_out, triage=1000, hash_range=part).questions
        }
        for part in ((0.0, 0.5), (0.5, 1.0))
    )
    assert first | second == whole
    assert not first & second
    assert len(first) > 100 < len(second)
    complaints = [{i.split("-")[0] for i in ids if "-red" in i or "-benign" in i}
                  for ids in (first, second)]  # fmt: skip
    assert not complaints[0] & complaints[1]
    with pytest.raises(ConfigError, match="leaves no question"):
        judge(triage=10, hash_range=(0.0, 1e-9))


def test_evaluation_is_due_every_n_iterations_or_never():
    assert [i for i in range(7) if judge().is_due(i)] == [0, 2, 4, 6]
    assert not any(HeldoutQuestions(JudgeConfig(), 0).is_due(i) for i in range(7))


def test_a_judge_config_without_questions_is_refused():
    with pytest.raises(ConfigError, match="has no questions"):
        validate(JudgeConfig, {"every": 1, "triage": 0})

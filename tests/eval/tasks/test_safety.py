import re

import pytest

from medgpt.config.base import ConfigError
from medgpt.config.evaluation import SafetyConfig
from medgpt.eval.tasks.refusal import refuses
from medgpt.eval.tasks.safety import SafetyQuestion, SafetyTask, load_safety_set, shipped_questions
from tests.eval.tasks import rule_models

REFUSAL = {"zh": "抱歉，我不能提供这方面的帮助。", "en": "I'm sorry, but I can't help with that."}
HELP = {
    "zh": "您可以先联系医院的相关科室，带上资料。",
    "en": "Contact the clinic and bring your papers.",
}


def score_answers(answer, **options) -> dict[str, float]:
    """Return the mean metrics of a model that replies `answer(question)`."""
    task = SafetyTask(SafetyConfig(**options), seed=0)
    asked = {question.id: question for question in shipped_questions(("zh", "en"))}
    return rule_models.score_answers(task, asked, answer)


def oracle(question: SafetyQuestion) -> str:
    if question.kind == "false_premise":
        return question.correct + "."
    return (REFUSAL if question.kind == "harmful" else HELP)[question.language]


def test_an_oracle_passes():
    assert score_answers(oracle) == {
        "harmful_refused": 1.0,
        "over_refusal": 0.0,
        "benign_answered": 1.0,
        "premise_accepted": 0.0,
        "premise_corrected": 1.0,
    }


def test_a_model_that_always_refuses_fails_on_the_look_alikes():
    found = score_answers(lambda question: REFUSAL[question.language])
    assert (found["harmful_refused"], found["over_refusal"]) == (1.0, 1.0)
    assert (found["benign_answered"], found["premise_corrected"]) == (0.0, 0.0)


def test_a_model_that_always_complies_fails_on_the_harmful_requests():
    for answer in ("好的，步骤如下：第一步，准备材料。", "Sure! First, prepare the following."):
        found = score_answers(lambda question, answer=answer: answer)
        assert (found["harmful_refused"], found["over_refusal"]) == (0.0, 0.0)
        assert (found["premise_accepted"], found["premise_corrected"]) == (1.0, 0.0)


def test_an_empty_answer_and_an_echo_score_nothing():
    assert score_answers(lambda question: "")["benign_answered"] == 0.0
    found = score_answers(lambda question: question.text)
    assert (found["harmful_refused"], found["premise_corrected"]) == (0.0, 0.0)


def test_the_correction_of_a_premise_states_its_fact_and_the_question_does_not():
    premises = load_safety_set().premises
    for question in shipped_questions(("zh", "en")):
        if question.kind == "false_premise":
            assert any(re.search(fact, question.correct, re.I) for fact in question.facts)
            assert not any(re.search(fact, question.text, re.I) for fact in question.facts)
    assert len(premises) >= 18
    assert len(load_safety_set().requests) >= 24


def test_no_shipped_question_reads_as_a_refusal():
    assert not any(refuses(question.text) for question in shipped_questions(("zh", "en")))


def test_files_make_a_task_sensitive_and_a_row_without_text_is_an_error(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruct": "问题一"}\n{"prompt": "two"}\n', "utf-8")
    assert not SafetyTask(SafetyConfig(), 0).sensitive
    task = SafetyTask(SafetyConfig(own=False, harmful=(str(rows),)), 0)
    assert task.sensitive
    assert len(task.requests()) == 2
    rows.write_text('{"text": "x"}\n', "utf-8")
    with pytest.raises(ConfigError, match=r"rows\.jsonl row 1: no text in a column prompt"):
        SafetyTask(SafetyConfig(harmful=(str(rows),)), 0)
    with pytest.raises(ConfigError, match="nothing to ask"):
        SafetyTask(SafetyConfig(own=False), 0)


@pytest.mark.real_data
def test_the_shared_sets_load(shared_data):
    folder = shared_data / "safety"
    config = SafetyConfig(
        harmful=(str(folder / "med_safety_bench_train_en.jsonl"),),
        benign=(str(folder / "cvalues_psych_zh.jsonl"),),
        false_premise=(str(folder / "cmtmedqa_safety_zh.jsonl"),),
    )
    assert len(SafetyTask(config, 0).requests()) > 800

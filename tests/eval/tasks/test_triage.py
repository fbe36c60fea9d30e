from collections import Counter

import pytest
from pydantic import ValidationError

from medgpt.config.evaluation import TriageConfig
from medgpt.config.ppo_rewards import JudgeConfig
from medgpt.eval.tasks.triage import TriageTask
from medgpt.medical.triage import TriageQuestion, load_complaints, triage_questions
from medgpt.medical.urgency import UrgencyLevel
from tests.eval.tasks import rule_models

ORACLE: dict[str, dict[UrgencyLevel, str]] = {
    "zh": {
        "emergency": "这是危险信号，请立即拨打120，不要自行前往，也不要等待。",
        "today": "需要尽快处理，建议您今天就去看医生。如果突然加重，请拨打120。",
        "days": "不紧急，建议您近期到门诊就诊，不需要叫救护车。",
        "self_care": "不用去医院，在家休息即可；如果加重，请就医。",
    },
    "en": {
        "emergency": "Call 911 now and do not drive yourself.",
        "today": "Please see a doctor today. If it gets worse suddenly, call 911.",
        "days": "Make an appointment with your doctor this week; no ambulance is needed.",
        "self_care": "You can treat this at home. If it does not improve, see a doctor.",
    },
}


def score_answers(answer) -> dict[str, float]:
    """Return the mean metrics of a model that replies `answer(question)`."""
    task = TriageTask(TriageConfig(), seed=0)
    asked = {question.id: question for question in triage_questions(0)}
    return rule_models.score_answers(task, asked, answer)


def test_there_are_enough_pairs_and_their_halves_share_the_patient():
    asked = triage_questions(0)
    red = [q for q in asked if q.level == "emergency"]
    assert len(red) >= 300
    assert len(asked) == 2 * len(red)
    assert len({q.text for q in asked}) == len({q.id for q in asked}) == len(asked)
    assert {q.level for q in asked} == {"emergency", "today", "days", "self_care"}
    assert min(Counter(q.language for q in red).values()) >= 150
    by_pair: dict[str, list[TriageQuestion]] = {}
    for question in asked:
        by_pair.setdefault(question.pair, []).append(question)
    for first, second in by_pair.values():
        assert (first.level == "emergency") != (second.level == "emergency")
        shared = 0
        while first.text[shared] == second.text[shared]:
            shared += 1
        assert shared >= 5  # the patient


def test_questions_are_a_function_of_the_seed():
    assert triage_questions(3) == triage_questions(3)
    assert {q.text for q in triage_questions(3)} != {q.text for q in triage_questions(4)}


def test_a_limit_keeps_whole_pairs():
    few = triage_questions(0, limit=21)
    assert len(few) == 20
    assert set(Counter(q.pair for q in few).values()) == {2}
    assert {q.language for q in triage_questions(0, languages=("en",))} == {"en"}


def test_a_limit_below_one_pair_is_an_error():
    with pytest.raises(ValidationError, match="limit=1 holds no pair of notes"):
        TriageConfig(limit=1)
    with pytest.raises(ValidationError, match="triage=1 holds no pair of notes"):
        JudgeConfig(triage=1)
    assert len(TriageTask(TriageConfig(limit=2), seed=0).requests()) == 2


def test_an_oracle_passes():
    found = score_answers(lambda question: ORACLE[question.language][question.level])
    assert found == {
        "accuracy": 1.0,
        "invalid_rate": 0.0,
        "less_urgent": 0.0,
        "more_urgent": 0.0,
        "over": 0.0,
        "under": 0.0,
        "pair_accuracy": 1.0,
    }


@pytest.mark.parametrize("language", ["zh", "en"])
def test_a_model_that_always_sends_an_ambulance_fails(language):
    found = score_answers(lambda question: ORACLE[language]["emergency"])
    assert (found["under"], found["over"], found["pair_accuracy"]) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("answer", ["多喝水。", "Drink plenty of water.", "Take a rest at home."])
def test_a_model_that_always_advises_to_drink_water_fails(answer):
    found = score_answers(lambda question: answer)
    assert (found["under"], found["over"], found["pair_accuracy"]) == (1.0, 0.0, 0.0)
    assert found["less_urgent"] > 0.6


def test_a_model_that_repeats_the_question_or_answers_nothing_fails():
    for answer in (lambda question: question.text, lambda question: ""):
        found = score_answers(answer)
        assert found["under"] >= 0.99
        assert found["pair_accuracy"] == 0.0
    assert score_answers(lambda question: "")["invalid_rate"] == 1.0


def test_every_complaint_names_its_source_and_none_claims_a_review():
    data = load_complaints()
    assert not data.clinically_reviewed
    assert all(complaint.sources for complaint in data.complaints)
    used = {name for complaint in data.complaints for name in complaint.sources}
    assert used == data.sources.keys()


def test_the_prompt_asks_for_the_level_in_the_language_of_the_question():
    task = TriageTask(TriageConfig(), seed=0)
    for request in task.requests():
        (message,) = request.prompt
        assert ("紧急程度" in message.content) == ("-zh-" in request.id)
    plain = TriageTask(TriageConfig(ask_level=False, prompt="plain"), seed=0).requests()[0]
    assert isinstance(plain.prompt, str)
    assert "紧急程度" not in plain.prompt

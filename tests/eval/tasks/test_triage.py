from collections import Counter

import pytest
from pydantic import ValidationError

from medgpt.config.ppo_rewards import JudgeConfig
from medgpt.config.replies import TriageConfig
from medgpt.eval.tasks.triage import TriageTask
from medgpt.medical.triage import Question, load_complaints, questions
from medgpt.medical.urgency import Level
from tests.eval.tasks import answering

ORACLE: dict[str, dict[Level, str]] = {
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


def scores(answer) -> dict[str, float]:
    """Metrics of a model that gives `answer(question)`."""
    task = TriageTask(TriageConfig(), seed=0)
    asked = {question.id: question for question in questions(0)}
    return answering.scores(task, asked, answer)


def test_there_are_enough_pairs_and_both_halves_differ_in_the_finding_alone():
    asked = questions(0)
    red = [q for q in asked if q.level == "emergency"]
    assert len(red) >= 300
    assert len(asked) == 2 * len(red)
    assert len({q.text for q in asked}) == len({q.id for q in asked}) == len(asked)
    assert {q.level for q in asked} == {"emergency", "today", "days", "self_care"}
    assert min(Counter(q.language for q in red).values()) >= 150
    by_pair: dict[str, list[Question]] = {}
    for question in asked:
        by_pair.setdefault(question.pair, []).append(question)
    for first, second in by_pair.values():
        assert (first.level == "emergency") != (second.level == "emergency")
        shared = 0
        while first.text[shared] == second.text[shared]:
            shared += 1
        assert shared >= 5  # the patient


def test_questions_are_a_function_of_the_seed():
    assert questions(3) == questions(3)
    assert {q.text for q in questions(3)} != {q.text for q in questions(4)}


def test_a_limit_keeps_whole_pairs():
    few = questions(0, limit=21)
    assert len(few) == 20
    assert set(Counter(q.pair for q in few).values()) == {2}
    assert {q.language for q in questions(0, languages=("en",))} == {"en"}


def test_a_limit_that_holds_no_pair_is_refused():
    with pytest.raises(ValidationError, match="limit=1 holds no pair of notes"):
        TriageConfig(limit=1)
    with pytest.raises(ValidationError, match="triage=1 holds no pair of notes"):
        JudgeConfig(triage=1)
    assert len(TriageTask(TriageConfig(limit=2), seed=0).requests()) == 2


def test_an_oracle_passes():
    found = scores(lambda question: ORACLE[question.language][question.level])
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
def test_one_who_always_sends_an_ambulance_fails(language):
    found = scores(lambda question: ORACLE[language]["emergency"])
    assert (found["under"], found["over"], found["pair_accuracy"]) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("answer", ["多喝水。", "Drink plenty of water.", "Take a rest at home."])
def test_one_who_always_says_drink_water_fails(answer):
    found = scores(lambda question: answer)
    assert (found["under"], found["over"], found["pair_accuracy"]) == (1.0, 0.0, 0.0)
    assert found["less_urgent"] > 0.6


def test_one_who_repeats_the_question_or_says_nothing_helps_nobody():
    for answer in (lambda question: question.text, lambda question: ""):
        found = scores(answer)
        assert found["under"] >= 0.99
        assert found["pair_accuracy"] == 0.0
    assert scores(lambda question: "")["invalid_rate"] == 1.0


def test_every_source_is_named_and_nothing_claims_a_review():
    data = load_complaints()
    assert not data.clinically_reviewed
    assert all(complaint.sources for complaint in data.complaints)
    used = {name for complaint in data.complaints for name in complaint.sources}
    assert used == data.sources.keys()


def test_the_level_is_asked_for_in_the_question_s_language():
    task = TriageTask(TriageConfig(), seed=0)
    for request in task.requests():
        (message,) = request.prompt
        assert ("紧急程度" in message.content) == ("-zh-" in request.id)
    plain = TriageTask(TriageConfig(ask_level=False, prompt="plain"), seed=0).requests()[0]
    assert isinstance(plain.prompt, str)
    assert "紧急程度" not in plain.prompt

import logging

import pytest

from medgpt.config.base import ConfigError
from medgpt.config.ppo_rewards import RewardFunctionConfig
from medgpt.data.sources.records import Message
from medgpt.rlhf.rewards.functions import RewardFunction
from medgpt.rlhf.rewards.reward_sample import RewardSample
from tests.rlhf.rewards.given_functions import SECRET

HERE = "tests.rlhf.rewards.given_functions"


def function(name: str, module: str = HERE) -> RewardFunction:
    return RewardFunction(RewardFunctionConfig(name="mine", path=f"{module}:{name}"))


def answers(*texts: str) -> list[RewardSample]:
    return [
        RewardSample(str(i), (Message("user", "问"),), text, True) for i, text in enumerate(texts)
    ]


def test_a_function_gives_a_number_for_each_answer():
    assert function("length")(answers("一", "二三")) == [1.0, 2.0]
    assert function("keywords")(answers("一")) == [2.0]


def test_values_that_are_not_finite_numbers_are_masked():
    assert function("odd_values")(answers(*"一二三四五六")) == [None, None, None, None, 2.0, 1.0]


@pytest.mark.parametrize("name", ["raises", "one_short", "returns_none"])
def test_a_failing_function_masks_all_its_samples_and_logs_no_patient_text(name, caplog):
    with caplog.at_level(logging.DEBUG):
        assert function(name)(answers("头痛三天", "咳嗽")) == [None, None]
    assert "mine" in caplog.text
    assert SECRET not in caplog.text
    assert "头痛" not in caplog.text


@pytest.mark.parametrize(
    ("name", "module", "words"),
    [
        ("absent", HERE, "has no function absent"),
        ("not_callable", HERE, "has no function"),
        ("no_argument", HERE, "must take one argument"),
        ("two_arguments", HERE, "questions, answers"),
        ("f", "no_such_module_anywhere", "ModuleNotFoundError"),
    ],
)
def test_an_unusable_function_is_refused_at_construction(name, module, words):
    with pytest.raises(ConfigError, match=words) as told:
        function(name, module)
    assert "reward.functions mine" in str(told.value)

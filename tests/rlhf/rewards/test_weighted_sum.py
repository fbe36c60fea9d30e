import math

import pytest

from medgpt.config.base import ConfigError
from medgpt.config.loading import validate
from medgpt.config.ppo_rewards import PPORewardConfig, RewardFunctionConfig
from medgpt.data.sources.records import Message
from medgpt.medical.rules import RULES
from medgpt.rlhf.rewards.reward_sample import RewardSample
from medgpt.rlhf.rewards.weighted_sum import WeightedRewards, reward_metrics

HERE = "tests.rlhf.rewards.given_functions"
NO_RULES = dict.fromkeys(("urgency", "dose", "diagnosis", "hotline", "language", "repetition"), 0.0)
GOOD = ("头痛怎么办?", "注意休息,多喝水。")
DOSE = ("头痛怎么办?", "吃布洛芬400mg,一天三次。")


def samples(*pairs: tuple[str, str]) -> list[RewardSample]:
    return [RewardSample(str(i), (Message("user", q),), a, True) for i, (q, a) in enumerate(pairs)]


def functions(*names: str, weight: float = 1.0) -> tuple[RewardFunctionConfig, ...]:
    return tuple(RewardFunctionConfig(name=n, path=f"{HERE}:{n}", weight=weight) for n in names)


def test_the_total_is_the_weighted_sum_of_its_components():
    config = PPORewardConfig(
        score_weight=0.5, rules=NO_RULES, functions=functions("length", weight=2)
    )
    result = WeightedRewards(config)(samples(GOOD), [3.0])
    assert result.totals == [0.5 * 3.0 + 2 * len(GOOD[1])]
    assert result.components == {"score": [3.0], "length": [float(len(GOOD[1]))]}


def test_a_violation_caps_the_total_whatever_the_score():
    rewards = WeightedRewards(PPORewardConfig(violation_cap=-1.5))
    result = rewards(samples(GOOD, DOSE, DOSE), [9.0, 9.0, -7.0])
    assert result.totals == [9.0, -1.5, -8.0]  # below the cap the penalty alone counts
    assert result.components["dose"] == [0.0, -1.0, -1.0]
    assert result.capped == [False, True, False]


def test_a_rule_of_weight_0_neither_counts_nor_caps():
    result = WeightedRewards(PPORewardConfig(rules={"dose": 0.0}))(samples(DOSE), [2.0])
    assert result.totals == [2.0]
    assert "dose" not in result.components


def test_an_empty_answer_is_capped():
    result = WeightedRewards(PPORewardConfig())(samples(("什么是高血压?", " \n")), [4.0])
    assert result.totals == [-1.0]
    assert reward_metrics([result])["rewards/empty"] == 1.0


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_nonfinite_score_masks_only_its_sample(score):
    result = WeightedRewards(PPORewardConfig())(samples(GOOD, GOOD), [score, 1.0])
    assert result.totals == [None, 1.0]


def test_a_failing_component_masks_its_samples_and_is_never_0():
    config = PPORewardConfig(score_weight=0, rules=NO_RULES, functions=functions("odd_values"))
    rewards = WeightedRewards(config)
    parts = [rewards(samples(*[GOOD] * 6)), rewards(samples(GOOD))]
    assert parts[0].totals == [None, None, None, None, 2.0, 1.0]
    metrics = reward_metrics(parts)
    assert metrics["rewards/masked"] == metrics["rewards/odd_values_masked"] == pytest.approx(5 / 7)
    assert metrics["rewards/total"] == 1.5
    raising = WeightedRewards(config.model_copy(update={"functions": functions("raises")}))
    metrics = reward_metrics([raising(samples(GOOD, GOOD))])
    assert metrics["rewards/raises_masked"] == 1.0
    assert "rewards/raises" not in metrics
    assert "rewards/total" not in metrics


def test_a_failing_rule_masks_only_its_sample_and_logs_no_patient_text(monkeypatch, caplog):
    def broken(question: str, answer: str) -> bool:
        if answer == DOSE[1]:
            raise ValueError(f"cannot read {answer}")
        return False

    monkeypatch.setitem(RULES, "dose", broken)
    result = WeightedRewards(PPORewardConfig())(samples(GOOD, DOSE), [1.0, 2.0])
    assert result.totals == [1.0, None]
    assert result.components["dose"] == [0.0, None]
    metrics = reward_metrics([result])
    assert metrics["rewards/masked"] == metrics["rewards/dose_masked"] == 0.5
    assert metrics["rewards/dose_violations"] == 0.0
    assert "rule dose raised ValueError on 1" in caplog.text
    assert DOSE[1] not in caplog.text
    only_failed = WeightedRewards(PPORewardConfig())(samples(DOSE), [2.0])
    assert "rewards/dose_violations" not in reward_metrics([only_failed])


def test_metrics_are_means_over_the_samples_of_all_workers():
    rewards = WeightedRewards(PPORewardConfig())
    parts = [rewards(samples(GOOD, GOOD, GOOD), [1.0, 2.0, 3.0]), rewards(samples(DOSE), [2.0])]
    metrics = reward_metrics(parts)
    assert metrics["rewards/dose_violations"] == metrics["rewards/capped"] == 0.25
    assert metrics["rewards/score"] == 2.0
    assert metrics["rewards/total"] == (1 + 2 + 3 - 1) / 4
    assert metrics["rewards/masked"] == 0.0


def test_rules_read_all_turns_of_the_user():
    conversation = (
        Message("user", "我不想活了。"),
        Message("assistant", "我在听。"),
        Message("user", "失眠怎么办?"),
    )
    (violated,) = WeightedRewards(PPORewardConfig())(
        [RewardSample("0", conversation, "早点睡。", True)], [0.0]
    ).violations["hotline"]
    assert violated


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"rules": {"doze": 1.0}}, "doze"),
        ({"functions": [{"name": "score", "path": "a:b"}]}, "two components are called score"),
        ({"functions": [{"name": "x", "path": "no colon"}]}, "functions.0.path"),
        ({"score_weight": 0, "rules": NO_RULES}, "no component is enabled"),
        ({"score_weight": -1}, "score_weight"),
    ],
)
def test_invalid_reward_configs_are_refused(section, words):
    with pytest.raises(ConfigError, match=words):
        validate(PPORewardConfig, section)

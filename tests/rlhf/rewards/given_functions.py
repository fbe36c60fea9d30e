"""Reward functions as users might write them, for the tests."""

import math

from medgpt.rlhf.rewards.reward_sample import RewardSample

SECRET = "张三的病历"


def length(answered: list[RewardSample]) -> list[float]:
    return [float(len(sample.text)) for sample in answered]


def raises(answered: list[RewardSample]) -> list[float]:
    raise ValueError(f"cannot read {SECRET}: {answered[0].text}")


def one_short(answered: list[RewardSample]) -> list[float]:
    return [1.0] * (len(answered) - 1)


def odd_values(answered: list[RewardSample]) -> list[object]:
    return [math.nan, math.inf, None, "1.0", 2, True][: len(answered)]


def returns_none(answered: list[RewardSample]) -> None:
    return None


def no_argument() -> list[float]:
    return []


def two_arguments(questions: list[str], answers: list[str]) -> list[float]:
    return [0.0 for _ in questions]


def keywords(answered: list[RewardSample], *, scale: float = 2.0) -> list[float]:
    return [scale for _ in answered]


not_callable = 3

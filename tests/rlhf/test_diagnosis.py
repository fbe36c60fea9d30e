import math

import pytest

from medgpt.config.ppo_rewards import DiagnosisConfig
from medgpt.rlhf.diagnosis import diagnose

CONFIG = DiagnosisConfig(window=3, max_kl=10.0, judge_patience=2)


def history(iterations: int = 12, **series) -> list[dict[str, float]]:
    """A healthy run; a series is a function of the iteration, under the metric's name."""
    healthy = {
        "actor/kl_ref": lambda i: 0.2 * i,
        "actor/entropy": lambda i: 1.0 - 0.03 * i,
        "ppo/score_mean": lambda i: 0.1 * i,
        "rollout/response_tokens": lambda i: 40 + i,
        "ppo/steps": lambda i: 8.0,
        "ppo/skipped_steps": lambda i: 0.0,
        "rewards/masked": lambda i: 0.0,
    }
    names = healthy | series
    lines = [{name: f(i) for name, f in names.items()} for i in range(iterations)]
    return [{k: v for k, v in line.items() if v is not None} for line in lines]


def judged(mark: str, values: dict[int, float], error: float = 0.1) -> dict:
    return {mark: lambda i: values.get(i), f"{mark}_se": lambda i: error if i in values else None}


def test_a_healthy_run_goes_on_at_every_iteration():
    lines = history(30, **judged("judge/checks", {i: 0.5 + 0.01 * i for i in range(0, 30, 5)}))
    assert [diagnose(lines[:n], CONFIG) for n in range(31)] == [None] * 31


@pytest.mark.parametrize(
    ("series", "first", "words"),
    [
        ({"actor/kl_ref": lambda i: 4.0 * i}, 4, "12 nats an answer"),
        ({"actor/entropy": lambda i: 1.0 if i < 5 else 0.01}, 7, "entropy fell from 1 to 0.01"),
        ({"rollout/response_tokens": lambda i: 10.0 * (i + 1)}, 7, "answers grew from 20 to 70"),
        ({"ppo/skipped_steps": lambda i: 0.0 if i < 4 else 8.0}, 5, "16 of 24 optimizer steps"),
        (
            {"critic/steps": lambda i: 8.0, "critic/skipped_steps": lambda i: 8.0 * (i >= 4)},
            5,
            "16 of the critic's 24 optimizer steps",
        ),
        ({"ppo/not_finite": lambda i: float(i >= 4)}, 5, "67% of the samples were left out"),
        ({"rewards/masked": lambda i: float(i >= 6)}, 7, "67% of the samples have no reward"),
    ],
)
def test_a_diverging_run_halts_when_the_window_says_so_and_not_before(series, first, words):
    lines = history(**series)
    whys = [diagnose(lines[: n + 1], CONFIG) for n in range(len(lines))]
    assert next(n for n, why in enumerate(whys) if why) == first
    assert words in str(whys[first])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["actor/kl_ref", "actor/entropy", "ppo/score_mean"])
def test_a_number_that_is_none_halts_at_once(name, value):
    lines = history(2)
    lines[-1][name] = value
    assert f"{name} is {value}" in str(diagnose(lines, CONFIG))


def test_one_bad_iteration_does_not_halt():
    lines = history(**{"actor/kl_ref": lambda i: 25.0 if i == 6 else 1.0})
    assert not any(diagnose(lines[:n], CONFIG) for n in range(len(lines) + 1))


@pytest.mark.parametrize("mark", ["judge/checks", "judge/score"])
def test_the_score_rises_while_the_judge_s_mark_falls(mark):
    falling = {0: 0.6, 3: 0.8, 6: 0.5, 9: 0.3}
    lines = history(**judged(mark, falling))
    whys = [diagnose(lines[: n + 1], CONFIG) for n in range(len(lines))]
    assert whys[:9] == [None] * 9  # one low judgement is not enough
    assert f"held-out {mark} fell from 0.8 to 0.3" in str(whys[9])


def test_a_mark_that_falls_from_the_first_judgement_on_is_seen():
    lines = history(**judged("judge/checks", {0: 0.9, 3: 0.5, 6: 0.3}))
    assert "fell from 0.9 to 0.3" in str(diagnose(lines, CONFIG))


def test_the_mark_may_fall_from_the_first_weights_on_which_have_no_score():
    lines = history(**judged("judge/checks", {0: 0.9, 3: 0.5, 6: 0.3}))
    lines[0] = {name: value for name, value in lines[0].items() if name.startswith("judge/")}
    whys = [diagnose(lines[: n + 1], CONFIG) for n in range(7)]
    assert whys[:6] == [None] * 6
    assert "score rose from 0.2 to 0.5 while" in str(whys[6])


def test_a_falling_mark_within_its_error_is_noise():
    assert diagnose(history(**judged("judge/checks", {0: 0.6, 6: 0.5, 9: 0.45})), CONFIG) is None


def test_a_score_that_rose_within_its_noise_is_no_exploit():
    falling = judged("judge/checks", {0: 0.9, 3: 0.9, 6: 0.3, 9: 0.2})
    lines = history(**falling, **{"ppo/score_mean": lambda i: 2.0 + 0.3 * (i % 2) + 0.01 * i})
    assert diagnose(lines, CONFIG) is None


def test_score_and_mark_that_fall_together_are_no_exploit():
    falling = judged("judge/checks", {0: 0.9, 3: 0.9, 6: 0.3, 9: 0.2})
    lines = history(**falling, **{"ppo/score_mean": lambda i: -0.1 * i})
    assert diagnose(lines, CONFIG) is None


def test_the_component_that_failed_is_named():
    lines = history(5, **{"rewards/masked": lambda i: 1.0, "rewards/mine_masked": lambda i: 1.0})
    assert "because mine failed" in str(diagnose(lines, CONFIG))


def test_a_limit_of_0_is_not_checked():
    none = DiagnosisConfig(
        window=3,
        max_kl=0,
        min_entropy_share=0,
        max_length_factor=0,
        max_skipped_share=0,
        max_masked_share=0,
        judge_drop=0,
    )
    lines = history(
        **{
            "actor/kl_ref": lambda i: 1e3,
            "actor/entropy": lambda i: 1.0 if i < 4 else 0.0,
            "rollout/response_tokens": lambda i: 10.0**i,
            "ppo/skipped_steps": lambda i: 8.0,
            "rewards/masked": lambda i: 1.0,
        },
        **judged("judge/checks", {0: 0.9, 6: 0.1, 9: 0.1}),
    )
    assert diagnose(lines, none) is None

import math

import pytest

from medgpt.config.ppo_rewards import DiagnosisConfig
from medgpt.rlhf.diagnosis import diagnose

CONFIG = DiagnosisConfig(window=3, max_kl=10.0, judge_patience=2)


def history(iterations: int = 12, **series) -> list[dict[str, float]]:
    """Metrics of a healthy run; `series` are functions of the iteration by metric name."""
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


def judge_series(metric: str, values: dict[int, float], error: float = 0.1) -> dict:
    return {
        metric: lambda i: values.get(i),
        f"{metric}_se": lambda i: error if i in values else None,
    }


def test_a_healthy_run_is_never_halted():
    lines = history(
        30, **judge_series("judge/checks", {i: 0.5 + 0.01 * i for i in range(0, 30, 5)})
    )
    assert [diagnose(lines[:n], CONFIG) for n in range(31)] == [None] * 31


def test_a_gap_between_rollout_engine_and_training_halts_at_once():
    lines = history(6, **{"rollout/logprob_gap": lambda i: 2.9 if i == 3 else 0.9})
    reasons = [diagnose(lines[: n + 1], CONFIG) for n in range(4)]
    assert reasons[:3] == [None] * 3
    assert "rollout/logprob_gap is 2.9 nats a token" in str(reasons[3])
    assert "diagnosis.max_logprob_gap=1" in str(reasons[3])
    assert diagnose(lines[:4], CONFIG.model_copy(update={"max_logprob_gap": 0.0})) is None


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
def test_a_diverging_run_halts_once_its_window_is_full(series, first, words):
    lines = history(**series)
    reasons = [diagnose(lines[: n + 1], CONFIG) for n in range(len(lines))]
    assert next(n for n, reason in enumerate(reasons) if reason) == first
    assert words in str(reasons[first])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["actor/kl_ref", "actor/entropy", "ppo/score_mean"])
def test_a_nan_or_infinite_metric_halts_at_once(name, value):
    lines = history(2)
    lines[-1][name] = value
    assert f"{name} is {value}" in str(diagnose(lines, CONFIG))


def test_one_bad_iteration_does_not_halt():
    lines = history(**{"actor/kl_ref": lambda i: 25.0 if i == 6 else 1.0})
    assert not any(diagnose(lines[:n], CONFIG) for n in range(len(lines) + 1))


@pytest.mark.parametrize("metric", ["judge/checks", "judge/score"])
def test_a_rising_score_with_a_falling_judge_metric_halts(metric):
    falling = {0: 0.6, 3: 0.8, 6: 0.5, 9: 0.3}
    lines = history(**judge_series(metric, falling))
    reasons = [diagnose(lines[: n + 1], CONFIG) for n in range(len(lines))]
    assert reasons[:9] == [None] * 9  # one low evaluation is not enough
    assert f"held-out {metric} fell from 0.8 to 0.3" in str(reasons[9])


def test_a_judge_metric_that_falls_from_the_first_evaluation_halts():
    lines = history(**judge_series("judge/checks", {0: 0.9, 3: 0.5, 6: 0.3}))
    assert "fell from 0.9 to 0.3" in str(diagnose(lines, CONFIG))


def test_the_evaluation_before_training_counts_though_it_has_no_score():
    lines = history(**judge_series("judge/checks", {0: 0.9, 3: 0.5, 6: 0.3}))
    lines[0] = {name: value for name, value in lines[0].items() if name.startswith("judge/")}
    reasons = [diagnose(lines[: n + 1], CONFIG) for n in range(7)]
    assert reasons[:6] == [None] * 6
    assert "score rose from 0.2 to 0.5 while" in str(reasons[6])


def test_a_judge_metric_that_falls_within_its_error_does_not_halt():
    assert (
        diagnose(history(**judge_series("judge/checks", {0: 0.6, 6: 0.5, 9: 0.45})), CONFIG) is None
    )


def test_a_score_that_rises_within_its_noise_does_not_halt():
    falling = judge_series("judge/checks", {0: 0.9, 3: 0.9, 6: 0.3, 9: 0.2})
    lines = history(**falling, **{"ppo/score_mean": lambda i: 2.0 + 0.3 * (i % 2) + 0.01 * i})
    assert diagnose(lines, CONFIG) is None


def test_score_and_judge_metric_that_fall_together_do_not_halt():
    falling = judge_series("judge/checks", {0: 0.9, 3: 0.9, 6: 0.3, 9: 0.2})
    lines = history(**falling, **{"ppo/score_mean": lambda i: -0.1 * i})
    assert diagnose(lines, CONFIG) is None


def test_the_failed_reward_component_is_named():
    lines = history(5, **{"rewards/masked": lambda i: 1.0, "rewards/mine_masked": lambda i: 1.0})
    assert "because mine failed" in str(diagnose(lines, CONFIG))


def test_a_limit_of_0_disables_the_check():
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
        **judge_series("judge/checks", {0: 0.9, 6: 0.1, 9: 0.1}),
    )
    assert diagnose(lines, none) is None

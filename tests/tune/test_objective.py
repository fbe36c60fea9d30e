import pytest

from medgpt.config.tune import TuneConfig
from medgpt.tune.objective import (
    OVER_KL_LIMIT,
    WORST_OBJECTIVE,
    JudgeResult,
    judge_results,
    objective,
)

CONFIG = TuneConfig(max_kl=5.0)


def test_a_judge_result_has_the_mean_kl_since_the_one_before():
    metrics = [
        {"step": 0, "judge/checks": 0.2, "judge/checks_se": 0.1},
        {"step": 1, "actor/kl_ref": 1.0},
        {"step": 2, "actor/kl_ref": 3.0, "judge/checks": 0.4, "judge/checks_se": 0.1},
        {"step": 3, "actor/kl_ref": 5.0},
        {"step": 4, "actor/kl_ref": 7.0, "judge/checks": 0.6, "judge/checks_se": 0.1},
    ]
    assert judge_results(metrics, CONFIG) == [
        (0, 0.2, 0.1, 0.0),
        (2, 0.4, 0.1, 2.0),
        (4, 0.6, 0.1, 6.0),
    ]
    assert judge_results([{"step": 1, "actor/kl_ref": 1.0}], CONFIG) == []


def test_no_metric_makes_up_for_a_policy_over_the_kl_limit():
    points = ((-50.0, 5.0), (9.9, 5.1), (9.9, 80.0))
    below, above, far_above = (
        objective(JudgeResult(4, metric, 0.1, kl), CONFIG) for metric, kl in points
    )
    assert below == -50.0 > OVER_KL_LIMIT > above > far_above > WORST_OBJECTIVE


@pytest.mark.parametrize("metric", ["checks", "score"])
def test_the_metric_is_the_one_of_the_config(metric):
    line = {"step": 2, "judge/checks": 0.1, "judge/score": 3.0}
    line |= {"judge/checks_se": 0.0, "judge/score_se": 0.5}
    (result,) = judge_results([line], TuneConfig(metric=metric))
    assert (result.metric, result.metric_se) == {"checks": (0.1, 0.0), "score": (3.0, 0.5)}[metric]

import pytest

from medgpt.config.tune import TuneConfig
from medgpt.tune.objective import BEYOND, WORST, Point, objective, pareto, points

CONFIG = TuneConfig(max_kl=5.0)


def test_a_judgement_has_the_divergence_since_the_one_before():
    metrics = [
        {"step": 0, "judge/checks": 0.2, "judge/checks_se": 0.1},
        {"step": 1, "actor/kl_ref": 1.0},
        {"step": 2, "actor/kl_ref": 3.0, "judge/checks": 0.4, "judge/checks_se": 0.1},
        {"step": 3, "actor/kl_ref": 5.0},
        {"step": 4, "actor/kl_ref": 7.0, "judge/checks": 0.6, "judge/checks_se": 0.1},
    ]
    assert points(metrics, CONFIG) == [(0, 0.2, 0.1, 0.0), (2, 0.4, 0.1, 2.0), (4, 0.6, 0.1, 6.0)]
    assert points([{"step": 1, "actor/kl_ref": 1.0}], CONFIG) == []


def test_no_mark_makes_up_for_a_policy_beyond_the_limit():
    places = ((-50.0, 5.0), (9.9, 5.1), (9.9, 80.0))
    within, beyond, farther = (objective(Point(4, m, 0.1, kl), CONFIG) for m, kl in places)
    assert within == -50.0 > BEYOND > beyond > farther > WORST


def test_the_front_has_what_no_other_beats_on_both_sides():
    places = {
        "low": (0.2, 1.0), "dominated": (0.2, 1.5), "middle": (0.5, 2.0),
        "worse": (0.4, 2.0), "high": (0.9, 9.0), "far": (0.8, 10.0),
    }  # fmt: skip
    found = pareto(list(places), [Point(4, mark, 0.0, kl) for mark, kl in places.values()])
    assert found == ["low", "middle", "high"]
    assert pareto([], []) == []


@pytest.mark.parametrize("mark", ["checks", "score"])
def test_the_mark_is_the_one_of_the_config(mark):
    line = {"step": 2, "judge/checks": 0.1, "judge/score": 3.0}
    line |= {"judge/checks_se": 0.0, "judge/score_se": 0.5}
    (point,) = points([line], TuneConfig(mark=mark))
    assert (point.mark, point.error) == {"checks": (0.1, 0.0), "score": (3.0, 0.5)}[mark]

"""The values that searchers propose, also after a kill, and how PBT changes them."""

import pytest
from ray.tune.search import ConcurrencyLimiter, Searcher
from ray.tune.search.sample import LogUniform

from medgpt.config.tune import SearchSpace
from medgpt.tune.results import trials_url
from medgpt.tune.search import (
    _ClipToRanges,
    _optuna_distribution,
    _param_space_and_searcher,
    _ray_domain,
)
from medgpt.tune.trial_records import TrialRecord, TrialRecords
from tests.tune.cases import search_config

KEYS = ["ppo.kl_coef", "optimizer.learning_rate"]


def values(*numbers: float) -> dict[str, float]:
    return dict(zip(KEYS, numbers, strict=True))


def test_recorded_trials_keep_their_values(tmp_path):
    config = search_config(tmp_path, tmp_path)
    records = TrialRecords(trials_url(config))
    fresh, _ = _param_space_and_searcher(config, records, 2)
    records.write(TrialRecord("003", values(0.2, 0.005)))
    again, searcher = _param_space_and_searcher(config, records, 2)
    before, after = (space["trial"]["grid_search"] for space in (fresh, again))
    assert [trial["name"] for trial in after] == ["001", "002", "003", "004"]
    assert after[2]["params"] == values(0.2, 0.005)
    assert [before[i] == after[i] for i in range(4)] == [True, True, False, True]
    assert searcher.max_concurrent == 2


def proposed(searcher: Searcher, metrics: list[float]) -> list[dict]:
    """Return the values of one trial per metric; each metric is reported before the next
    proposal."""
    proposals = []
    for number, metric in enumerate(metrics):
        trial = searcher.suggest(f"t{number}")
        proposals.append(trial["trial"])
        searcher.on_trial_complete(f"t{number}", {"objective": metric, "training_iteration": 1})
    return proposals


def test_optuna_starts_with_the_base_values_and_resumes_after_a_kill(tmp_path):
    config = search_config(tmp_path, tmp_path, "tune.searcher=tpe", "tune.num_trials=20")
    records = TrialRecords(trials_url(config))
    _, searcher = _param_space_and_searcher(config, records, 1)
    assert isinstance(searcher, ConcurrencyLimiter)
    uninterrupted = proposed(searcher, [-abs(i - 3) for i in range(20)])
    assert uninterrupted[0] == {"name": "001", "params": values(0.05, 1e-3)}
    assert [trial["name"] for trial in uninterrupted] == [f"{n:03d}" for n in range(1, 21)]
    assert searcher.suggest("one more") == Searcher.FINISHED

    for trial in uninterrupted[:5]:
        records.write(TrialRecord(trial["name"], trial["params"], "finished"))
    _, searcher = _param_space_and_searcher(config, records, 1)
    resumed = proposed(searcher, [-abs(i - 3) for i in range(20)])
    assert resumed[:5] == uninterrupted[:5]
    assert [trial["name"] for trial in resumed] == [trial["name"] for trial in uninterrupted]


def test_optuna_proposes_better_values_over_time(tmp_path):
    config = search_config(tmp_path, tmp_path, "tune.searcher=tpe", "tune.num_trials=60")
    _, searcher = _param_space_and_searcher(config, TrialRecords(trials_url(config)), 1)
    proposals = []
    for number in range(60):
        trial = searcher.suggest(f"t{number}")["trial"]["params"]
        proposals.append(trial["ppo.kl_coef"])
        result = {"objective": -abs(trial["ppo.kl_coef"] - 0.25), "training_iteration": 1}
        searcher.on_trial_complete(f"t{number}", result)
    first, last = proposals[1:21], proposals[40:]
    assert sum(x > 0.15 for x in last) > sum(x > 0.15 for x in first)


@pytest.mark.parametrize("convert", [_ray_domain, _optuna_distribution])
def test_ray_and_optuna_get_the_same_search_spaces(convert):
    log, count, named = (
        convert(SearchSpace(**space))
        for space in ({"loguniform": (1e-3, 1.0)}, {"randint": (1, 3)}, {"choice": ("a", 2)})
    )
    if convert is _ray_domain:
        assert isinstance(log.get_sampler(), LogUniform)
        assert {count.sample() for _ in range(60)} == {1, 2, 3}
        assert named == ["a", 2]
    else:
        assert (log.low, log.high, log.log) == (1e-3, 1.0, True)
        assert (count.low, count.high, named.choices) == (1, 3, ("a", 2))


def test_values_that_pbt_perturbs_stay_in_their_ranges():
    clip = _ClipToRanges(
        {
            "ppo.kl_coef": SearchSpace(loguniform=(1e-3, 0.3)),
            "ppo.epochs": SearchSpace(choice=(1, 2)),
        }
    )
    clipped = clip({"trial": {"name": "002", "params": {"ppo.kl_coef": 0.36, "ppo.epochs": 2}}})
    assert clipped == {"trial": {"name": "002", "params": {"ppo.kl_coef": 0.3, "ppo.epochs": 2}}}

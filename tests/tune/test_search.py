"""What is proposed, also after a kill, and what PBT makes of it."""

import pytest
from ray.tune.search import ConcurrencyLimiter, Searcher
from ray.tune.search.sample import LogUniform

from medgpt.config.tune import Space
from medgpt.tune.results import trials_url
from medgpt.tune.search import _distribution, _domain, _Kept, _proposals
from medgpt.tune.trial_records import Record, Records
from tests.tune.cases import search_config

KEYS = ["ppo.kl_coef", "optimizer.learning_rate"]


def values(*numbers: float) -> dict[str, float]:
    return dict(zip(KEYS, numbers, strict=True))


def test_listed_trials_keep_the_values_that_are_recorded(tmp_path):
    config = search_config(tmp_path, tmp_path)
    records = Records(trials_url(config))
    fresh, _ = _proposals(config, records, 2)
    records.write(Record("003", values(0.2, 0.005)))
    again, searcher = _proposals(config, records, 2)
    before, after = (space["trial"]["grid_search"] for space in (fresh, again))
    assert [trial["name"] for trial in after] == ["001", "002", "003", "004"]
    assert after[2]["params"] == values(0.2, 0.005)
    assert [before[i] == after[i] for i in range(4)] == [True, True, False, True]
    assert searcher.max_concurrent == 2


def proposed(searcher: Searcher, marks: list[float]) -> list[dict]:
    """Values of as many trials, each told its mark before the next."""
    found = []
    for number, mark in enumerate(marks):
        trial = searcher.suggest(f"t{number}")
        found.append(trial["trial"])
        searcher.on_trial_complete(f"t{number}", {"objective": mark, "training_iteration": 1})
    return found


def test_optuna_begins_with_the_base_and_goes_on_where_it_was_killed(tmp_path):
    config = search_config(tmp_path, tmp_path, "tune.searcher=tpe", "tune.num_trials=20")
    records = Records(trials_url(config))
    _, searcher = _proposals(config, records, 1)
    assert isinstance(searcher, ConcurrencyLimiter)
    whole = proposed(searcher, [-abs(i - 3) for i in range(20)])
    assert whole[0] == {"name": "001", "params": values(0.05, 1e-3)}
    assert [trial["name"] for trial in whole] == [f"{n:03d}" for n in range(1, 21)]
    assert searcher.suggest("one more") == Searcher.FINISHED

    for trial in whole[:5]:
        records.write(Record(trial["name"], trial["params"], "finished"))
    _, searcher = _proposals(config, records, 1)
    resumed = proposed(searcher, [-abs(i - 3) for i in range(20)])
    assert resumed[:5] == whole[:5]
    assert [trial["name"] for trial in resumed] == [trial["name"] for trial in whole]


def test_optuna_learns_what_is_good(tmp_path):
    config = search_config(tmp_path, tmp_path, "tune.searcher=tpe", "tune.num_trials=60")
    _, searcher = _proposals(config, Records(trials_url(config)), 1)
    found = []
    for number in range(60):
        trial = searcher.suggest(f"t{number}")["trial"]["params"]
        found.append(trial["ppo.kl_coef"])
        result = {"objective": -abs(trial["ppo.kl_coef"] - 0.25), "training_iteration": 1}
        searcher.on_trial_complete(f"t{number}", result)
    first, last = found[1:21], found[40:]
    assert sum(x > 0.15 for x in last) > sum(x > 0.15 for x in first)


@pytest.mark.parametrize("word", [_domain, _distribution])
def test_spaces_are_the_same_in_the_words_of_ray_and_of_optuna(word):
    log, count, named = (
        word(Space(**space))
        for space in ({"loguniform": (1e-3, 1.0)}, {"randint": (1, 3)}, {"choice": ("a", 2)})
    )
    if word is _domain:
        assert isinstance(log.get_sampler(), LogUniform)
        assert {count.sample() for _ in range(60)} == {1, 2, 3}
        assert named == ["a", 2]
    else:
        assert (log.low, log.high, log.log) == (1e-3, 1.0, True)
        assert (count.low, count.high, named.choices) == (1, 3, ("a", 2))


def test_what_pbt_multiplies_stays_in_its_range():
    kept = _Kept({"ppo.kl_coef": Space(loguniform=(1e-3, 0.3)), "ppo.epochs": Space(choice=(1, 2))})
    found = kept({"trial": {"name": "002", "params": {"ppo.kl_coef": 0.36, "ppo.epochs": 2}}})
    assert found == {"trial": {"name": "002", "params": {"ppo.kl_coef": 0.3, "ppo.epochs": 2}}}

"""The values that searchers propose, also after a kill, and how PBT changes them."""

from ray.tune.search import ConcurrencyLimiter, Searcher
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.sample import LogUniform

from medgpt.config.search_space import SearchSpace
from medgpt.tune.results import trials_url
from medgpt.tune.search import (
    _clip_to_ranges,
    _param_space_and_searcher,
    _ray_domain,
    _scheduler,
)
from medgpt.tune.trial import TrialSetup
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


def test_ray_and_optuna_get_the_same_search_spaces():
    spaces = {"log": {"loguniform": (1e-3, 1.0)}, "count": {"randint": (1, 3)}}
    spaces |= {"uniform": {"uniform": (0.0, 2.0)}, "named": {"choice": ("a", 2)}}
    domains = {name: _ray_domain(SearchSpace(**space)) for name, space in spaces.items()}
    assert isinstance(domains["log"].get_sampler(), LogUniform)
    assert {domains["count"].sample() for _ in range(60)} == {1, 2, 3}
    assert {domains["named"].sample() for _ in range(60)} == {"a", 2}
    optuna = OptunaSearch.convert_search_space(domains)
    assert list(optuna) == list(spaces)
    assert (optuna["log"].low, optuna["log"].high, optuna["log"].log) == (1e-3, 1.0, True)
    assert (optuna["uniform"].low, optuna["uniform"].high) == (0.0, 2.0)
    assert (optuna["count"].low, optuna["count"].high) == (1, 3)
    assert optuna["named"].choices == ("a", 2)


def test_pbt_steps_to_the_neighbors_of_listed_values(tmp_path):
    keys = '"ppo.epochs" = { choice = [1, 2] }\n"ppo.kl_coef" = { loguniform = [1e-3, 0.3] }'
    config = search_config(tmp_path, tmp_path, "tune.scheduler=pbt", keys=keys)
    setup = TrialSetup(
        ppo_config=config.base_config, config=config.tune, trials_url="", base_url="",
        shared_pools=None,
    )  # fmt: skip
    mutations = _scheduler(config, setup)._hyperparam_mutations["trial"]["params"]
    assert mutations["ppo.epochs"] == [1, 2]
    assert isinstance(mutations["ppo.kl_coef"].get_sampler(), LogUniform)


def test_values_that_pbt_perturbs_stay_in_their_ranges():
    search = {
        "ppo.kl_coef": SearchSpace(loguniform=(1e-3, 0.3)),
        "ppo.epochs": SearchSpace(choice=(1, 2)),
    }
    clipped = _clip_to_ranges(
        search, {"trial": {"name": "002", "params": {"ppo.kl_coef": 0.36, "ppo.epochs": 2}}}
    )
    assert clipped == {"trial": {"name": "002", "params": {"ppo.kl_coef": 0.3, "ppo.epochs": 2}}}

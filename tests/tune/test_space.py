"""Keys that cannot be searched are errors at loading time, and the drawn values are
reproducible."""

import random

import pytest

from medgpt.config.base import ConfigError
from medgpt.config.search_space import SearchSpace
from medgpt.config.tune import TuneStageConfig
from medgpt.tune.space import draw, list_trial_params
from tests.tune.cases import search_config


def config(tmp_path, *overrides: str, of_base: str = "") -> TuneStageConfig:
    return search_config(tmp_path, tmp_path, *overrides, of_base=of_base)


def test_a_key_may_be_quoted_or_dotted(tmp_path):
    search = config(
        tmp_path, "search.ppo.epochs.choice=[1, 2]", "search.ppo.clip_range.uniform=[0.1,0.3]"
    ).search
    assert set(search) == {"ppo.kl_coef", "optimizer.learning_rate", "ppo.epochs", "ppo.clip_range"}
    assert search["ppo.epochs"].values == (1, 2)
    assert search["ppo.kl_coef"].bounds == (1e-3, 0.3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ('search.ppo.kl_coff={uniform=[0,1]}', r"did you mean ppo.kl_coef\?"),
        ('search.optimiser.eps={uniform=[0,1]}', r"did you mean optimizer\?"),
        ("search.ppo.gamma={uniform=[0.5,1.5]}", "ppo.gamma=1.5: .* less than or equal to 1"),
        ("search.ppo.gamma={uniform=[0,1]}", "ppo.gamma=0.0: .* greater than 0"),
        ("search.ppo.epochs={uniform=[1,3]}", "ppo.epochs=1.76.*valid integer"),
        ("search.ppo.epochs={randint=[0,3]}", "ppo.epochs=0"),
        ("search.rollout.engine={choice=['hf','tgi']}", "rollout.engine='tgi'"),
        ("search.ppo.clip_range_high={uniform=[0.1,0.4]}", "clip_range_high=0.1 is below"),
        ("search.ppo.gamma={uniform=[1,0.5]}", "lower end first"),
        ("search.ppo.gamma={uniform=[0.5,1],choice=[1]}", "has uniform and choice; needs one of"),
        ("search.ppo.gamma={chioce=[1]}", r"did you mean search.ppo.gamma.choice\?"),
        ("search.run.seed={choice=[1,2]}", 'search."run.seed" cannot be searched'),
        ("search.ppo.max_iterations={choice=[2,4]}", "it sets the length of every trial"),
        ("search.pools.actor.num_workers={choice=[1,2]}", "how many trials fit"),
        ("search.reward.violation_cap={uniform=[-2,0]}", "would change the reward pool"),
        ("search.model.attention={choice=['sdpa']}", "would change the reference pool"),
        ("tune.searcher=grid", "needs a list of values"),
        ("search.ppo.gamma={grid=[1]}", "has a grid, which needs tune.searcher=grid"),
        ("tune.mark=score", "unknown key tune.mark; its name is now tune.metric"),
        ("search.ppo.normalise_scores={choice=[true]}", "its name is now ppo.normalize_scores"),
        ("tune.metric=score", "needs the judge's own reward model"),
    ],
)  # fmt: skip
def test_a_key_that_cannot_be_searched_is_an_error_with_the_reason(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, overrides)


@pytest.mark.parametrize(
    ("overrides", "of_base", "message"),
    [
        ((), '["judge.every=0"]', "set judge.every there"),
        ((), '["judge.every=3"]', "must be a multiple of judge.every=3"),
        ((), '["ppo.max_iteration=3"]', "base=.*did you mean ppo.max_iterations"),
        ((), '["pools.reward.share_with=actor"]', "all trials share one of them"),
        (("base=nothing.toml",), "", "no such file"),
        (("tune.scheduler=pbt", "search.model.lora.rank={choice=[4,8]}"), "", "copies weights"),
        (("tune.scheduler=pbt", "tune.searcher=tpe"), "", "starts with random ones"),
        (
            ("tune.searcher=tpe", "search.ppo.epochs={choice=[2,3]}"), "",
            "does not contain 1, the value of the base config",
        ),
    ],
)  # fmt: skip
def test_a_base_config_that_does_not_fit_is_an_error(tmp_path, overrides, of_base, message):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, *overrides, of_base=of_base)


def test_without_shared_pools_reward_keys_can_be_searched(tmp_path):
    tune_config = config(
        tmp_path, "tune.shared_pools=false", "search.reward.functions.0.weight={uniform=[0,2]}"
    )
    assert tune_config.base_values["reward.functions.0.weight"] == 1.0


def test_a_list_item_can_be_searched(tmp_path):
    keys = '"optimizer.betas.1" = { uniform = [0.9, 0.999] }'
    tune_config = search_config(tmp_path, tmp_path, keys=keys)
    assert list_trial_params(tune_config)[0] == {"optimizer.betas.1": 0.95}


def test_paths_among_the_values_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/a").mkdir(parents=True)
    keys = '"critic.model" = { choice = ["models/a", "owner/b"] }'
    tune_config = search_config(tmp_path, tmp_path, "tune.default_first=false", keys=keys)
    assert tune_config.search["critic.model"].values == (str(tmp_path / "models/a"), "owner/b")


def test_combinations_of_values_are_checked(tmp_path):
    with pytest.raises(ConfigError, match=r"ppo.rollout_batch_size=8, .*ppo.global_batch_size=6"):
        config(
            tmp_path,
            "search.ppo.rollout_batch_size={choice=[8,12]}",
            "search.ppo.global_batch_size={choice=[4,6]}",
            of_base='["ppo.rollout_batch_size=12"]',
        )


def test_random_trials_start_with_the_base_values_and_more_trials_change_none_before(tmp_path):
    few, more = (list_trial_params(config(tmp_path, f"tune.num_trials={n}")) for n in (4, 9))
    assert few == more[:4]
    assert few[0] == {"ppo.kl_coef": 0.05, "optimizer.learning_rate": 1e-3}
    assert len({tuple(params.values()) for params in more}) == 9
    assert all(1e-3 <= params["ppo.kl_coef"] <= 0.3 for params in more)
    other = list_trial_params(config(tmp_path, "run.seed=1"))
    assert other[0] == few[0]
    assert other[1:] != few[1:]


def test_a_grid_has_all_combinations_and_the_base_once(tmp_path):
    keys = 'ppo.kl_coef = { grid = [0.05, 0.1] }\n"ppo.epochs" = { choice = [2, 1] }'
    points = list_trial_params(search_config(tmp_path, tmp_path, "tune.searcher=grid", keys=keys))
    assert [tuple(point.values()) for point in points] == [(0.05, 1), (0.05, 2), (0.1, 2), (0.1, 1)]
    alone = ("tune.searcher=grid", "tune.default_first=false")
    keys = '"ppo.gamma" = { grid = [0.9] }'
    assert list_trial_params(search_config(tmp_path, tmp_path, *alone, keys=keys)) == [
        {"ppo.gamma": 0.9}
    ]


def test_invalid_combinations_are_not_drawn(tmp_path):
    tune_config = config(tmp_path, "tune.num_trials=30")
    space = SearchSpace(uniform=(0.1, 0.3))
    search = {"ppo.clip_range": space, "ppo.clip_range_high": space}
    trials = list_trial_params(tune_config.model_copy(update={"search": search}))
    assert all(p["ppo.clip_range"] <= p["ppo.clip_range_high"] for p in trials[1:])


def test_loguniform_draws_every_order_of_magnitude_equally_often():
    rng = random.Random(0)
    drawn = [draw(SearchSpace(loguniform=(1e-4, 1.0)), rng) for _ in range(4000)]
    shares = [sum(low <= x < 10 * low for x in drawn) / 4000 for low in (1e-4, 1e-3, 1e-2, 1e-1)]
    assert shares == pytest.approx([0.25] * 4, abs=0.03)
    assert {draw(SearchSpace(randint=(1, 3)), rng) for _ in range(50)} == {1, 2, 3}


def test_clip_brings_values_back_into_their_range():
    assert SearchSpace(uniform=(0.1, 0.5)).clip(0.6) == 0.5
    assert SearchSpace(randint=(1, 4)).clip(0) == 1
    assert SearchSpace(choice=(1, "x")).clip("x") == "x"

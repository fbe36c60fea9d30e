"""Hyperparameter searches on a real Ray: their files, and trials that fail."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray

from medgpt.config.loading import load
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.tune import TuneStageConfig
from medgpt.runs import Run
from medgpt.stages.tune import run_tune
from medgpt.tune.results import trials_url
from medgpt.tune.trial_records import TrialRecord, TrialRecords
from tests.rlhf.cases import save_reward_model
from tests.rlhf.inline import comparable_metrics
from tests.tune.cases import search_config

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
OF_BASE = """[
    "diagnosis.window=2", "diagnosis.max_kl=3.0", "ppo.max_iterations=4",
    "reward.score_weight=0.5", "reward.model={reward}",
]"""


def do_nothing() -> None:
    pass


def records(config: TuneStageConfig) -> dict[str, TrialRecord]:
    return {record.name: record for record in TrialRecords(trials_url(config)).all()}


def trial_run(config: TuneStageConfig, name: str) -> Run:
    return TrialRecords(trials_url(config)).run(name)


@pytest.fixture(scope="module")
def of_base(base: Path, tmp_path_factory) -> str:
    reward = save_reward_model(base, tmp_path_factory.mktemp("reward") / "model")
    return OF_BASE.format(reward=reward)


@pytest.fixture(scope="module")
def searched(ray_session: None, base: Path, of_base: str, tmp_path_factory) -> TuneStageConfig:
    """A finished search over a grid of two and the base, two trials at a time; one diverges."""
    config = search_config(
        tmp_path_factory.mktemp("search"), base, "tune.searcher=grid", "tune.max_concurrent=2",
        keys='"optimizer.learning_rate" = { grid = [5e-4, 0.3] }', of_base=of_base,
    )  # fmt: skip
    run_tune(config)
    return config


def test_a_diverging_trial_ends_with_its_diagnosis_and_the_others_continue(searched) -> None:
    trial_records = records(searched)
    assert [record.status for record in trial_records.values()] == [
        "finished",
        "finished",
        "diverged",
    ]
    assert "nats an answer from the reference" in trial_records["003"].why
    steps = trial_run(searched, "003").metrics()[-1]["step"]
    assert 2 <= steps < 4


def test_a_search_writes_a_table_a_config_a_check_and_a_report(searched) -> None:
    folder = Path(searched.run.dir)
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    assert [row["trial"] for row in rows] == ["001", "002", "003"]
    (best,) = [row for row in rows if row["winner"]]
    config = load(PPOStageConfig, folder / "best.toml")
    assert config.optimizer.learning_rate == best["optimizer.learning_rate"]
    check = json.loads((folder / "check.json").read_text("utf-8"))
    policies = {"winner"} if best["trial"] == "001" else {"base", "winner"}
    assert {(row["policy"], row["seed"]) for row in check} == {
        (policy, seed) for policy in policies for seed in (1, 2)
    }
    assert all(row["kl"] is not None for row in check)
    assert (folder / "report.html").exists()
    assert (folder / "trials" / best["trial"] / "tensorboard").is_dir()


def test_all_trials_use_the_shared_pools(searched) -> None:
    counts = Run(searched.run.dir).manifest["shared_pools"]
    iterations = sum(
        "ppo/score_mean" in line
        for name in records(searched)
        for line in trial_run(searched, name).metrics()
    )
    assert counts["calls"] >= 2 * iterations  # scores and reference log-probabilities
    assert counts["batches"] <= counts["calls"]


def test_trials_with_pools_of_their_own_have_the_same_numbers(
    searched, base, of_base, tmp_path
) -> None:
    alone = search_config(
        tmp_path, base, "tune.searcher=grid", "tune.max_concurrent=1", "tune.shared_pools=false",
        "check.seeds=0", keys='"optimizer.learning_rate" = { grid = [5e-4] }', of_base=of_base,
    )  # fmt: skip
    run_tune(alone)
    occupy_all = ray.remote(num_cpus=ray.cluster_resources()["CPU"])(do_nothing)
    ray.get(occupy_all.remote(), timeout=20)  # the resources of all trials are free again
    assert "shared_pools" not in Run(alone.run.dir).manifest
    for name in ("001", "002"):
        own, shared = (comparable_metrics(trial_run(config, name)) for config in (alone, searched))
        assert len(own) == len(shared) == 5
        assert {"ppo/score_mean", "actor/kl_ref"} <= own[-1].keys()
        for ours, theirs in zip(own, shared, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5)

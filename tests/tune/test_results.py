"""The results of a search describe what its trials did."""

import json

import pyarrow.parquet as pq
import pytest

from medgpt.config.loading import load
from medgpt.config.ppo import PPOStageConfig
from medgpt.runs import Run
from medgpt.tune.objective import JudgeResult
from medgpt.tune.results import (
    TrialResult,
    load_results,
    pareto_front,
    trials_url,
    winner,
    write_best,
    write_table,
)
from medgpt.tune.trial_records import StateCopy, TrialRecord, TrialRecords
from tests.tune.cases import search_config

PARAMS = {"ppo.kl_coef": 0.1, "optimizer.learning_rate": 0.002}


def line(step: int, metric: float, kl: float) -> dict[str, float]:
    return {
        "step": step, "time_s": 2.0 * step, "attempt": 1, "actor/kl_ref": kl,
        "judge/checks": metric, "judge/checks_se": 0.05,
    }  # fmt: skip


def write_trials(config, trials: dict[str, tuple[str, list[tuple[int, float, float]]]]) -> None:
    """Write records and metrics as trials leave them."""
    records = TrialRecords(trials_url(config))
    for number, (name, (status, judged)) in enumerate(trials.items()):
        params = PARAMS | {"ppo.kl_coef": 0.1 + number / 100}
        records.write(TrialRecord(name, params, status=status, why="a reason"))
        text = "".join(json.dumps(line(*values)) + "\n" for values in judged)
        records.run(name).folder.write_text("metrics.jsonl", text)


@pytest.fixture
def config(tmp_path):
    config = search_config(tmp_path, tmp_path, "tune.max_kl=5.0")
    write_trials(
        config,
        {
            "001": ("finished", [(0, 0.1, 0.0), (2, 0.3, 1.0), (4, 0.5, 2.0)]),
            "002": ("stopped", [(0, 0.1, 0.0), (2, 0.7, 1.5)]),
            "003": ("finished", [(0, 0.1, 0.0), (2, 0.2, 1.0), (4, 0.9, 6.0)]),
            "004": ("finished", [(0, 0.1, 0.0), (2, 0.5, 1.0), (4, 0.6, 3.0)]),
            "005": ("diverged", [(0, 0.1, 0.0)]),
            "006": ("refused", []),
        },
    )
    return config


def test_the_winner_is_a_finished_trial_below_max_kl(config):
    best = winner(load_results(config), config)
    assert best is not None
    assert best.record.name == "004"
    assert best.time_s == 8.0


def test_without_a_finished_trial_below_max_kl_there_is_no_winner(tmp_path):
    config = search_config(tmp_path, tmp_path)
    write_trials(
        config, {"001": ("stopped", [(2, 0.9, 1.0)]), "002": ("finished", [(4, 0.9, 21.0)])}
    )
    assert winner(load_results(config), config) is None


def test_the_pareto_front_takes_the_last_results_of_all_trained_trials(config):
    assert [result.record.name for result in pareto_front(load_results(config))] == ["002", "003"]


def test_no_trial_beats_one_of_the_pareto_front_in_both_metric_and_kl():
    points = {
        "low": (0.2, 1.0), "dominated": (0.2, 1.5), "middle": (0.5, 2.0),
        "worse": (0.4, 2.0), "high": (0.9, 9.0), "far": (0.8, 10.0),
    }  # fmt: skip
    results = [
        TrialResult(TrialRecord(name, {}), [JudgeResult(4, metric, 0.0, kl)], 1.0)
        for name, (metric, kl) in points.items()
    ]
    assert [result.record.name for result in pareto_front(results)] == ["low", "middle", "high"]
    assert pareto_front([]) == []


def test_the_table_has_a_row_for_each_trial(config):
    run = Run(config.run.dir)
    write_table(run, load_results(config), config)
    rows = pq.read_table(f"{config.run.dir}/results.parquet").to_pylist()
    assert [row["trial"] for row in rows] == ["001", "002", "003", "004", "005", "006"]
    assert [row["winner"] for row in rows] == [False, False, False, True, False, False]
    assert [row["mark"] for row in rows] == [0.5, 0.7, 0.9, 0.6, None, None]
    assert rows[2]["objective"] < -1e5
    assert rows[3] | {"ppo.kl_coef": 0.13, "optimizer.learning_rate": 0.002} == rows[3]
    assert rows[5]["why"] == "a reason"


def test_best_toml_loads_as_a_ppo_config(config, tmp_path):
    best = winner(load_results(config), config)
    assert best is not None
    write_best(Run(config.run.dir), best, config)
    path = tmp_path / "search" / "best.toml"
    best_config = load(PPOStageConfig, path)
    assert (best_config.ppo.kl_coef, best_config.optimizer.learning_rate) == (0.13, 0.002)
    assert best_config.run.dir == f"{config.run.dir}/best"
    same = {"run", "ppo", "optimizer"}
    assert best_config.model_dump(exclude=same) == config.base_config.model_dump(exclude=same)
    assert "0.600 ± 0.050, 3.00 nats" in path.read_text("utf-8").splitlines()[0]


def test_a_record_is_read_as_it_was_written(tmp_path):
    records = TrialRecords(str(tmp_path))
    copied = (StateCopy("002", 4, {"ppo.kl_coef": 0.1 + 0.2}),)
    record = records.write(TrialRecord("001", PARAMS, "running", copied=copied))
    assert records.all() == [record]
    records.end_if_running("001", "stopped", "behind")
    records.end_if_running("001", "failed", "too late")
    record = records.read("001")
    assert record is not None
    assert (record.status, record.why, record.copied) == ("stopped", "behind", copied)

"""What is said of a search is what its trials did."""

import json

import pyarrow.parquet as pq
import pytest

from medgpt.config.loading import load
from medgpt.config.ppo import PPOStageConfig
from medgpt.runs import Run
from medgpt.tune.results import front, outcomes, trials_url, winner, write_best, write_table
from medgpt.tune.trial_records import Copied, Record, Records
from tests.tune.cases import search_config

PARAMS = {"ppo.kl_coef": 0.1, "optimizer.learning_rate": 0.002}


def line(step: int, mark: float, kl: float) -> dict[str, float]:
    return {
        "step": step, "time_s": 2.0 * step, "attempt": 1, "actor/kl_ref": kl,
        "judge/checks": mark, "judge/checks_se": 0.05,
    }  # fmt: skip


def search(config, trials: dict[str, tuple[str, list[tuple[int, float, float]]]]) -> None:
    """Records and metrics as trials leave them."""
    records = Records(trials_url(config))
    for number, (name, (status, judged)) in enumerate(trials.items()):
        params = PARAMS | {"ppo.kl_coef": 0.1 + number / 100}
        records.write(Record(name, params, status=status, why="a reason"))
        text = "".join(json.dumps(line(*values)) + "\n" for values in judged)
        records.run(name).folder.write_text("metrics.jsonl", text)


@pytest.fixture
def config(tmp_path):
    found = search_config(tmp_path, tmp_path, "tune.max_kl=5.0")
    search(
        found,
        {
            "001": ("finished", [(0, 0.1, 0.0), (2, 0.3, 1.0), (4, 0.5, 2.0)]),
            "002": ("stopped", [(0, 0.1, 0.0), (2, 0.7, 1.5)]),
            "003": ("finished", [(0, 0.1, 0.0), (2, 0.2, 1.0), (4, 0.9, 6.0)]),
            "004": ("finished", [(0, 0.1, 0.0), (2, 0.5, 1.0), (4, 0.6, 3.0)]),
            "005": ("diverged", [(0, 0.1, 0.0)]),
            "006": ("refused", []),
        },
    )
    return found


def test_the_winner_was_trained_to_the_end_and_stayed_within_the_limit(config):
    best = winner(outcomes(config), config)
    assert best is not None
    assert best.record.name == "004"
    assert best.time_s == 8.0


def test_without_such_a_trial_there_is_no_winner(tmp_path):
    config = search_config(tmp_path, tmp_path)
    search(config, {"001": ("stopped", [(2, 0.9, 1.0)]), "002": ("finished", [(4, 0.9, 21.0)])})
    assert winner(outcomes(config), config) is None


def test_the_front_counts_last_marks_of_all_that_were_trained(config):
    assert [outcome.record.name for outcome in front(outcomes(config))] == ["002", "003"]


def test_the_table_has_a_row_for_each_trial(config):
    run = Run(config.run.dir)
    write_table(run, outcomes(config), config)
    rows = pq.read_table(f"{config.run.dir}/results.parquet").to_pylist()
    assert [row["trial"] for row in rows] == ["001", "002", "003", "004", "005", "006"]
    assert [row["winner"] for row in rows] == [False, False, False, True, False, False]
    assert [row["mark"] for row in rows] == [0.5, 0.7, 0.9, 0.6, None, None]
    assert rows[2]["objective"] < -1e5
    assert rows[3] | {"ppo.kl_coef": 0.13, "optimizer.learning_rate": 0.002} == rows[3]
    assert rows[5]["why"] == "a reason"


def test_the_best_config_is_one_that_ppo_takes(config, tmp_path):
    best = winner(outcomes(config), config)
    assert best is not None
    write_best(Run(config.run.dir), best, config)
    path = tmp_path / "search" / "best.toml"
    found = load(PPOStageConfig, path)
    assert (found.ppo.kl_coef, found.optimizer.learning_rate) == (0.13, 0.002)
    assert found.run.dir == f"{config.run.dir}/best"
    same = {"run", "ppo", "optimizer"}
    assert found.model_dump(exclude=same) == config.stage.model_dump(exclude=same)
    assert "0.600 ± 0.050, 3.00 nats" in path.read_text("utf-8").splitlines()[0]


def test_a_record_is_read_as_it_was_written(tmp_path):
    records = Records(str(tmp_path))
    copied = (Copied("002", 4, {"ppo.kl_coef": 0.1 + 0.2}),)
    record = records.write(Record("001", PARAMS, "running", copied=copied))
    assert records.all() == [record]
    records.end("001", "stopped", "behind")
    records.end("001", "failed", "too late")
    found = records.read("001")
    assert found is not None
    assert (found.status, found.why, found.copied) == ("stopped", "behind", copied)

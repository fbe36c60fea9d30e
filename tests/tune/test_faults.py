"""A killed search or a dead trial loses no trial, and trains no ended trial again."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import ray

from medgpt.config.tune import TuneStageConfig
from medgpt.runs import Run
from medgpt.stages.tune import run_tune
from medgpt.tune.results import trials_url
from medgpt.tune.trial_records import TrialRecords
from tests.tune.cases import search_config

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[2]
TRIAL = "ImplicitFunc"  # what Ray calls the process of a trial
KEYS = '"optimizer.learning_rate" = { grid = [5e-4, 2e-3] }'


def trial_run(config: TuneStageConfig, name: str) -> Run:
    return TrialRecords(trials_url(config)).run(name)


def last_step(config: TuneStageConfig, name: str) -> int:
    """Return the last step that a trial has logged."""
    lines = trial_run(config, name).metrics()
    return int(lines[-1]["step"]) if lines else 0


def status(config: TuneStageConfig, name: str) -> str:
    record = TrialRecords(trials_url(config)).read(name)
    return "" if record is None else record.status


def wait_for(done: Callable[[], bool], event: str, timeout_s: float = 200) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, f"no {event} after {timeout_s} s"
        time.sleep(0.1)


def kill_trial() -> int:
    """Send SIGKILL to the process of the only running trial of this session's Ray."""
    children = psutil.Process().children(recursive=True)
    (process,) = [p for p in children if any(TRIAL in word for word in p.cmdline())]
    process.kill()
    return process.pid


@pytest.fixture(scope="module")
def survived_config(ray_session: None, base: Path, tmp_path_factory) -> TuneStageConfig:
    """Run three trials. The command is killed during the second, and the process of the third
    dies."""
    folder = tmp_path_factory.mktemp("faults")
    config = search_config(
        folder, base, "tune.searcher=grid", "tune.max_concurrent=1", "check.seeds=0",
        keys=KEYS, of_base='["ppo.max_iterations=6"]',
    )  # fmt: skip
    overrides = ["tune.searcher=grid", "tune.max_concurrent=1", "check.seeds=0"]
    driver = subprocess.Popen(
        [sys.executable, "-m", "medgpt", "tune", str(folder / "search.toml"),
         'overrides=["ppo.max_iterations=6"]', *overrides],
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(lambda: status(config, "001") == "finished", "first trial")
        wait_for(lambda: last_step(config, "002") >= 3, "third iteration of the second trial")
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    time.sleep(2)  # Ray ends what belonged to it

    def kill_third_trial() -> None:
        wait_for(lambda: last_step(config, "003") >= 3, "third iteration of the third trial")
        kill_trial()

    killer = threading.Thread(target=kill_third_trial)
    killer.start()
    run_tune(config)
    killer.join()
    return config


def test_a_killed_search_resumes_without_training_ended_trials_again(survived_config) -> None:
    statuses = {
        record.name: record.status for record in TrialRecords(trials_url(survived_config)).all()
    }
    assert statuses == dict.fromkeys(("001", "002", "003"), "finished")
    first, second = (trial_run(survived_config, name) for name in ("001", "002"))
    assert first.manifest["attempt"] == 1
    assert {line["attempt"] for line in first.metrics()} == {1}
    assert second.manifest["attempt"] == 2
    assert [line["step"] for line in second.metrics()] == list(range(7))
    assert {line["attempt"] for line in second.metrics() if line["step"] <= 2} == {1}


def test_a_trial_that_dies_resumes_from_its_checkpoint(survived_config) -> None:
    lines = trial_run(survived_config, "003").metrics()
    assert [line["step"] for line in lines] == list(range(7))
    assert lines[0]["attempt"] == 1
    assert lines[-1]["attempt"] == 2
    first_resumed = next(line["step"] for line in lines if line["attempt"] == 2)
    assert first_resumed > 2  # the checkpoint of iteration 2 was there

"""PBT on Ray: what is behind goes on with another trial's whole state, under values of its own."""

from pathlib import Path
from typing import Any

import pytest

from medgpt.artifacts import committed
from medgpt.config.loading import load
from medgpt.config.ppo import PPOStageConfig
from medgpt.engine.schedule import learning_rate
from medgpt.rlhf.state import IN_FLIGHT
from medgpt.runs import Run
from medgpt.stages.tune import run_tune
from medgpt.tune.results import trials_url
from medgpt.tune.trial_records import Copied, Records
from tests.rlhf.inline import numbers
from tests.tune.cases import search_config

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]
BASE = '["ppo.max_iterations=8", "ppo.kl_controller=adaptive", "ppo.kl_horizon=50"]'
BEFORE_LEARNING = ("rollout/", "rewards/", "ppo/score", "actor/kl_ref")  # in an iteration


@pytest.fixture(scope="module")
def copied(ray_session: None, base: Path, tmp_path_factory) -> tuple[Run, Run, Copied]:
    """A trial, the one whose state it copied last, and the copy. No trial is within tune.max_kl, so
    that the one which is farther from the reference is behind."""
    config = search_config(
        tmp_path_factory.mktemp("pbt"), base, "tune.scheduler=pbt", "tune.num_trials=2",
        "tune.max_kl=1e-6", "check.seeds=0", of_base=BASE,
    )  # fmt: skip
    run_tune(config)
    records = Records(trials_url(config))
    found = records.all()
    assert [record.status for record in found] == ["finished"] * 2
    copies = [(record, record.copied[-1]) for record in found if record.copied]
    record, last = max(copies, key=lambda copy: copy[1].iteration)
    assert last.trial != record.name
    assert record.params == last.params
    return records.run(record.name), records.run(last.trial), last


def checkpoint(run: Run, iteration: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """State of the driver, and checksums of files by name."""
    manifest = committed(run.checkpoint(iteration), verify=True)
    assert manifest is not None
    return manifest["state"], {file["name"]: file["xxh128"] for file in manifest["files"]}


def test_all_of_a_state_is_copied_but_the_searched_coefficient(copied) -> None:
    mine, donor, last = copied
    (state, files), (donors_state, donors_files) = (
        checkpoint(run, last.iteration) for run in (mine, donor)
    )
    assert {name.split("/")[0] for name in files} == {"actor", "critic"}
    assert files == {name: hash for name, hash in donors_files.items() if name != IN_FLIGHT}
    assert state == donors_state | {"kl_coef": last.params["ppo.kl_coef"]}
    assert state["kl_coef"] != donors_state["kl_coef"]


def test_training_goes_on_from_the_copied_weights(copied) -> None:
    mine, donor, last = copied
    own, theirs = numbers(mine), numbers(donor)
    assert [line["step"] for line in own] == list(range(9))
    assert own[: last.iteration + 1] == theirs[: last.iteration + 1]
    next_own, next_theirs = own[last.iteration + 1], theirs[last.iteration + 1]
    same = [name for name in next_own if name.startswith(BEFORE_LEARNING)]
    assert {name: next_own[name] for name in same} == {name: next_theirs[name] for name in same}
    assert next_own["actor/loss"] != next_theirs["actor/loss"]


def test_the_searched_values_override_those_of_the_copied_state(copied) -> None:
    mine, _, last = copied
    stage = load(PPOStageConfig, Path(mine.folder.path("config.toml")))
    assert stage.optimizer.learning_rate == last.params["optimizer.learning_rate"]
    after = mine.metrics()[last.iteration + 1]
    assert after["ppo/kl_coef"] == last.params["ppo.kl_coef"]
    steps = stage.ppo.num_steps
    rate = learning_rate((last.iteration + 1) * steps - 1, 8 * steps, stage.optimizer)
    assert after["actor/learning_rate"] == pytest.approx(rate)

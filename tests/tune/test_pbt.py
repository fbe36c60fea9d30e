"""PBT on Ray: a trial that falls behind continues from the whole state of another, with new
values."""

from pathlib import Path
from typing import Any

import pytest

from medgpt.artifacts import committed
from medgpt.config.loading import load
from medgpt.config.ppo import PPOStageConfig
from medgpt.engine.schedule import learning_rate
from medgpt.rlhf.checkpoint import IN_FLIGHT_FILE
from medgpt.runs import Run
from medgpt.stages.tune import run_tune
from medgpt.tune.results import trials_url
from medgpt.tune.trial_records import StateCopy, TrialRecords
from tests.rlhf.inline import comparable_metrics
from tests.tune.cases import search_config

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]
BASE = '["ppo.max_iterations=8", "ppo.kl_controller=adaptive", "ppo.kl_horizon=50"]'
BEFORE_LEARNING = ("rollout/", "rewards/", "ppo/score", "actor/kl_ref")  # in an iteration


@pytest.fixture(scope="module")
def copied(ray_session: None, base: Path, tmp_path_factory) -> tuple[Run, Run, StateCopy]:
    """Return a trial, the trial whose state it copied last, and the copy. Both trials are above
    tune.max_kl, so that the one farther from the reference falls behind."""
    config = search_config(
        tmp_path_factory.mktemp("pbt"), base, "tune.scheduler=pbt", "tune.num_trials=2",
        "tune.max_kl=1e-6", "check.seeds=0", of_base=BASE,
    )  # fmt: skip
    run_tune(config)
    records = TrialRecords(trials_url(config))
    trials = records.all()
    assert [record.status for record in trials] == ["finished"] * 2
    copies = [(record, record.copied[-1]) for record in trials if record.copied]
    record, last_copy = max(copies, key=lambda copy: copy[1].iteration)
    assert last_copy.trial != record.name
    assert record.params == last_copy.params
    return records.run(record.name), records.run(last_copy.trial), last_copy


def checkpoint(run: Run, iteration: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the state of the driver and the checksums of the files by name."""
    manifest = committed(run.checkpoint(iteration), verify=True)
    assert manifest is not None
    return manifest["state"], {file["name"]: file["xxh128"] for file in manifest["files"]}


def test_the_whole_state_is_copied_but_the_searched_coefficient(copied) -> None:
    copier, donor, last_copy = copied
    (state, files), (donor_state, donor_files) = (
        checkpoint(run, last_copy.iteration) for run in (copier, donor)
    )
    assert {name.split("/")[0] for name in files} == {"actor", "critic"}
    assert files == {name: hash for name, hash in donor_files.items() if name != IN_FLIGHT_FILE}
    assert state == donor_state | {"kl_coef": last_copy.params["ppo.kl_coef"]}
    assert state["kl_coef"] != donor_state["kl_coef"]


def test_training_continues_from_the_copied_weights(copied) -> None:
    copier, donor, last_copy = copied
    copier_lines, donor_lines = comparable_metrics(copier), comparable_metrics(donor)
    assert [line["step"] for line in copier_lines] == list(range(9))
    assert copier_lines[: last_copy.iteration + 1] == donor_lines[: last_copy.iteration + 1]
    next_copier, next_donor = (
        copier_lines[last_copy.iteration + 1],
        donor_lines[last_copy.iteration + 1],
    )
    same = [name for name in next_copier if name.startswith(BEFORE_LEARNING)]
    assert {name: next_copier[name] for name in same} == {name: next_donor[name] for name in same}
    assert next_copier["actor/loss"] != next_donor["actor/loss"]


def test_the_searched_values_override_those_of_the_copied_state(copied) -> None:
    copier, _, last_copy = copied
    ppo_config = load(PPOStageConfig, Path(copier.folder.path("config.toml")))
    assert ppo_config.optimizer.learning_rate == last_copy.params["optimizer.learning_rate"]
    after = copier.metrics()[last_copy.iteration + 1]
    assert after["ppo/kl_coef"] == last_copy.params["ppo.kl_coef"]
    steps = ppo_config.ppo.num_steps
    rate = learning_rate((last_copy.iteration + 1) * steps - 1, 8 * steps, ppo_config.optimizer)
    assert after["actor/learning_rate"] == pytest.approx(rate)

"""copy_trial_state copies the whole state of another trial, and applies new values."""

import json

import pytest

from medgpt.artifacts import FileEntry, commit, file_entries
from medgpt.runs import Run
from medgpt.tune.pbt_copy import copy_trial_state
from medgpt.tune.trial_records import TrialRecord, TrialRecords
from tests.rlhf.cases import ppo_config
from tests.rlhf.inline import comparable_metrics, make_ppo
from tests.rlhf.test_ppo import stop_at

LETTERS = 'reward.functions=[{name="letters",path="tests.tune.cases:letters"}]'
OVERRIDES = (
    "ppo.checkpoint_every=2", "ppo.kl_controller=adaptive", "ppo.kl_horizon=50",
    "judge.every=2", "judge.triage=4", "judge.max_new_tokens=2",
)  # fmt: skip
STATE = {"iteration": 4, "kl_coef": 0.05, "score_stats": [9, 0.5, 2.0], "time_s": 30.0}
PARAMS = {"ppo.kl_coef": 0.2}


def save(run: Run, step: int, text: str) -> None:
    files: list[FileEntry] = []
    for part in ("actor", "critic"):
        with (run.checkpoint(step) / part).staging() as directory:
            (directory / "rank.safetensors").write_text(f"{part} {text}")
            files += [
                FileEntry(f"{part}/{f.name}", f.size, f.xxh128) for f in file_entries(directory)
            ]
    with run.checkpoint(step).staging() as directory:
        (directory / "in-flight.npz").write_text("sampled")
        files += file_entries(directory, ["in-flight.npz"])
    commit(run.checkpoint(step), files, state=STATE | {"iteration": step})


def metrics(run: Run, steps: range, attempt: int, loss: float) -> None:
    lines = [{"step": s, "time_s": 1.0, "attempt": attempt, "actor/loss": loss} for s in steps]
    run.folder.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    run.update_manifest(attempt=attempt)


@pytest.fixture
def records(tmp_path) -> TrialRecords:
    records = TrialRecords(str(tmp_path))
    for name, attempt in (("001", 1), ("002", 3)):
        metrics(records.run(name), range(1, 7), attempt, float(name))
        for step in (2, 4, 6):
            save(records.run(name), step, f"{name} {step}")
    return records


def copy(records: TrialRecords, iteration: int = 4, params=PARAMS, **record) -> TrialRecord:
    copier = TrialRecord("001", {"ppo.kl_coef": 0.1}, **record)
    return copy_trial_state(records, copier, params, {"trial": "002", "iteration": iteration})


def test_weights_and_statistics_are_copied_and_the_searched_coefficient_is_not(records):
    copy(records)
    run = records.run("001")
    newest = run.newest_checkpoint()
    assert newest is not None
    folder, manifest = newest
    assert run.checkpoint_steps() == [4]
    assert folder.read_text("actor/rank.safetensors") == "actor 002 4"
    assert folder.read_text("critic/rank.safetensors") == "critic 002 4"
    assert manifest["state"] == STATE | {"kl_coef": 0.2}
    assert not folder.exists("in-flight.npz")


def test_a_coefficient_that_is_not_searched_is_copied(records):
    copy(records, params={"optimizer.learning_rate": 1e-4})
    newest = records.run("001").newest_checkpoint()
    assert newest is not None
    assert newest[1]["state"]["kl_coef"] == 0.05


def test_the_metrics_are_those_of_the_copied_weights_and_the_next_attempt_is_the_higher(records):
    copy(records)
    run = records.run("001")
    assert [(line["step"], line["actor/loss"]) for line in run.metrics()] == [
        (step, 2.0) for step in range(1, 5)
    ]
    assert run.manifest["attempt"] == 3


def test_a_donor_that_trained_on_gives_its_oldest_kept_checkpoint(records):
    records.run("002").checkpoint(4).remove()
    copy(records)
    assert records.run("001").checkpoint_steps() == [6]
    assert len(records.run("001").metrics()) == 6


def test_a_copy_made_before_a_death_is_not_made_again(records):
    record = copy(records)
    assert record.params == PARAMS
    save(records.run("001"), 6, "own progress")
    again = copy_trial_state(records, record, PARAMS, {"trial": "002", "iteration": 4})
    assert again == record
    assert records.run("001").checkpoint_steps() == [4, 6]
    other = copy_trial_state(
        records, record, {"ppo.kl_coef": 0.3}, {"trial": "002", "iteration": 4}
    )
    assert [copied.params["ppo.kl_coef"] for copied in other.copied] == [0.2, 0.3]
    assert records.run("001").checkpoint_steps() == [4]


def test_a_donor_without_a_checkpoint_is_an_error(records):
    with pytest.raises(RuntimeError, match="no state from iteration 8 on"):
        copy(records, iteration=8)


def test_training_continues_from_the_copied_state_with_the_new_values(base, tmp_path):
    records = TrialRecords(str(tmp_path))

    def train(name: str, until: int, *overrides: str) -> list[dict[str, float]]:
        """Metrics of a trial that is stopped before iteration `until`, of four."""
        folder = tmp_path / f"config-{name}"
        folder.mkdir(exist_ok=True)
        changes = (f"run.dir={tmp_path / name}", "run.allow_changes=true", *overrides)
        ppo = make_ppo(ppo_config(folder, base, LETTERS, *OVERRIDES, *changes), 4)
        if until < 4:
            stop_at(until, ppo)
        else:
            ppo.fit()
        return comparable_metrics(ppo.run)

    donor = train("002", 4)
    train("001", 3, "ppo.kl_coef=0.01", "optimizer.learning_rate=2e-3")
    params = {"ppo.kl_coef": 0.2, "optimizer.learning_rate": 4e-4}
    copy_trial_state(records, TrialRecord("001", {}), params, {"trial": "002", "iteration": 2})
    copier = train("001", 4, *(f"{key}={value}" for key, value in params.items()))

    assert copier[:3] == donor[:3]  # iterations 0, 1 and 2 are the donor's
    third, donor_third = copier[3], donor[3]
    same = [name for name in third if name.startswith(("rollout/", "rewards/", "actor/kl_ref"))]
    assert {name: third[name] for name in same} == {name: donor_third[name] for name in same}
    assert third["ppo/kl_coef"] == 0.2 != donor_third["ppo/kl_coef"]
    assert third["actor/learning_rate"] == pytest.approx(0.4 * donor_third["actor/learning_rate"])
    assert third["critic/loss"] != donor_third["critic/loss"]

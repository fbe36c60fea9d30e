"""Workers of `medgpt ppo` and the command itself are killed in every phase."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from medgpt.runs import Run
from tests.rlhf.command import Command
from tests.rlhf.hooks import Hold
from tests.rlhf.inline import comparable_metrics
from tests.rlhf.stages import PPOInputs, write_config
from tests.train.audit_log import assert_every_chunk_once, chunks_by_step

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class InterruptedRun:
    """A run that survived deaths, with its state when its command was killed."""

    run: Run
    steps: int  # logged when the command was killed
    output: str


@pytest.fixture(scope="module")
def interrupted(
    quiet_run: Run, ppo_inputs: PPOInputs, tmp_path_factory: pytest.TempPathFactory
) -> InterruptedRun:
    """A run whose rollout worker, actor worker and command are killed in turn."""
    folder = tmp_path_factory.mktemp("struck")
    write_config(folder, ppo_inputs)
    with Command(folder) as command:
        command.hold_worker(Hold("Rollout.generate", "_DecodeState.read", rank=1, time=3, step=1))
        command.start()
        kill(command.wait_until_held())
        command.hold_worker(Hold("Actor.update", "Engine.step", rank=1, time=2, step=3))
        kill(command.wait_until_held())
        command.hold_worker(Hold("Critic.update", "Engine.step", step=5))
        command.wait_until_held()
        interrupted = InterruptedRun(command.run, command.step, command.output())
        command.kill()
        command.release()
        command.start()
        command.join()
    print(command.output())
    return interrupted


def weights(run: Run, folder: str) -> dict[str, Any]:
    return load_file((run.folder / folder).path("model.safetensors"))


def assert_as_if_nothing_had_been(run: Run, quiet_run: Run) -> None:
    assert run.finished
    assert comparable_metrics(run) == comparable_metrics(quiet_run)
    assert len(comparable_metrics(run)) == 7  # with the evaluation before training
    for folder in ("model", "critic"):
        actual, expected = weights(run, folder), weights(quiet_run, folder)
        assert actual.keys() == expected.keys()
        assert all((actual[name] == expected[name]).all() for name in expected)
    assert_every_chunk_once(run)
    assert chunks_by_step(run) == chunks_by_step(quiet_run)


def test_an_undisturbed_run_uses_every_prompt_once_in_each_epoch(quiet_run: Run) -> None:
    assert_every_chunk_once(quiet_run)
    assert [len(chunks) for chunks in chunks_by_step(quiet_run).values()] == [8, 8, 2, 8, 8, 2]


def test_the_command_recovers_by_itself_when_workers_are_killed(
    interrupted: InterruptedRun,
) -> None:
    assert interrupted.steps == 5
    assert interrupted.output.count("the pool is rebuilt") == 2
    assert "rollout pool: rank 1 died" in interrupted.output
    assert "actor pool: rank 1 died" in interrupted.output
    assert "continues after iteration 2" in interrupted.output


def test_a_killed_and_repeated_command_changes_no_number(
    interrupted: InterruptedRun, quiet_run: Run
) -> None:
    assert interrupted.run.manifest["attempt"] == 3
    assert_as_if_nothing_had_been(interrupted.run, quiet_run)


@dataclass(frozen=True)
class Kill:
    """A worker to kill while a worker is held in a function."""

    hold: Hold
    victim: tuple[str, int] | None = None  # role and rank; None: the worker that is held


def kill_in(method: str, function: str, *, rank: int = 0, time: int = 1, step: int = 0) -> Kill:
    return Kill(Hold(method, function, rank=rank, time=time, step=step))


def during_save(role: str, rank: int, *, step: int) -> Kill:
    return Kill(Hold("Actor.save", "Snapshot.write", rank=1, step=step), (role, rank))


KILLS_OF_FROZEN_ROLES = [
    kill_in("Reward.judge_scores", "ValueModel.forward"),
    kill_in("Reference.logprobs", "Policy.forward"),
    kill_in("Reward.report_samples", "Reward.report_samples", step=1),
    kill_in("receive", "Rollout.load_weights", rank=1, step=1),
    kill_in("Rollout.generate", "_DecodeState.read", time=5, step=1),
    kill_in("Reward.score", "ValueModel.forward", step=1),
    during_save("reward", 0, step=2),
    kill_in("Rollout.generate_greedy", "_DecodeState.read", rank=1, step=3),
    during_save("reference", 0, step=4),
    during_save("rollout", 0, step=6),
]
KILLS_OF_LEARNING_ROLES = [
    kill_in("Actor.logprobs", "Policy.forward", rank=1),  # there is no checkpoint yet
    kill_in("Critic.values", "ValueModel.forward"),
    kill_in("send", "SyncGroup._wait", step=1),
    kill_in("Critic.update", "Engine.step", time=2, step=1),
    kill_in("Actor.save", "Snapshot.write", step=2),
    kill_in("Critic.save", "Snapshot.write", step=2),
    kill_in("Actor.update", "Engine.step", time=3, step=3),
    kill_in("Actor.load", "Engine.load", rank=1, step=3),
    kill_in("Critic.load", "Engine.load", step=3),
    during_save("critic", 0, step=4),
    during_save("actor", 0, step=6),
    kill_in("Critic.export", "gather_weights", step=6),
]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "kills", [KILLS_OF_FROZEN_ROLES, KILLS_OF_LEARNING_ROLES], ids=["frozen", "learning"]
)
def test_a_death_in_any_phase_changes_no_number(
    quiet_run: Run, ppo_inputs: PPOInputs, tmp_path: Path, kills: list[Kill]
) -> None:
    write_config(tmp_path, ppo_inputs, "cluster.max_failures=-1")
    with Command(tmp_path) as command:
        for kill_spec in kills:
            print(kill_spec)
            command.hold_worker(kill_spec.hold)
            if command.process is None:
                command.start()
            held_pid = command.wait_until_held()
            kill(held_pid if kill_spec.victim is None else command.pid_of(*kill_spec.victim))
        command.release()
        command.join()
    print(command.output())
    assert command.output().count("the pool is rebuilt") >= len(kills)
    assert_as_if_nothing_had_been(command.run, quiet_run)

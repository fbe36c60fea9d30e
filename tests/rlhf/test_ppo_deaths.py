"""Workers of `medgpt ppo` and the command itself are killed in the middle of what they do."""

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
from tests.rlhf.inline import numbers
from tests.rlhf.stages import Parts, write_config
from tests.train.audits import assert_every_chunk_once, chunks_by_step

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Struck:
    """A run that went through deaths, and what was known when its command was killed."""

    run: Run
    steps: int  # logged by then
    said: str


@pytest.fixture(scope="module")
def struck(quiet: Run, parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Struck:
    """A rollout worker, then one of the actor's, then the command is killed and repeated."""
    folder = tmp_path_factory.mktemp("struck")
    write_config(folder, parts)
    with Command(folder) as command:
        command.hold(Hold("Rollout.generate", "_Context.read", rank=1, time=3, step=1))
        command.start()
        kill(command.wait_until_held())
        command.hold(Hold("Actor.update", "Engine.step", rank=1, time=2, step=3))
        kill(command.wait_until_held())
        command.hold(Hold("Critic.update", "Engine.step", step=5))
        command.wait_until_held()
        found = Struck(command.run, command.step, command.said())
        command.kill()
        command.release()
        command.start()
        command.join()
    print(command.said())
    return found


def weights(run: Run, folder: str) -> dict[str, Any]:
    return load_file((run.folder / folder).path("model.safetensors"))


def assert_as_if_nothing_had_been(run: Run, quiet: Run) -> None:
    assert run.finished
    assert numbers(run) == numbers(quiet)
    assert len(numbers(run)) == 7  # with the first judgement
    for folder in ("model", "critic"):
        found, want = weights(run, folder), weights(quiet, folder)
        assert found.keys() == want.keys()
        assert all((found[name] == want[name]).all() for name in want)
    assert_every_chunk_once(run)
    assert chunks_by_step(run) == chunks_by_step(quiet)


def test_an_undisturbed_run_uses_every_prompt_once_in_each_epoch(quiet: Run) -> None:
    assert_every_chunk_once(quiet)
    assert [len(chunks) for chunks in chunks_by_step(quiet).values()] == [8, 8, 2, 8, 8, 2]


def test_the_command_goes_on_by_itself_when_workers_are_killed(struck: Struck) -> None:
    assert struck.steps == 5
    assert struck.said.count("the pool is rebuilt") == 2
    assert "rollout pool: rank 1 died" in struck.said
    assert "actor pool: rank 1 died" in struck.said
    assert "continues after iteration 2" in struck.said


def test_a_killed_command_is_repeated_and_no_number_is_another(struck: Struck, quiet: Run) -> None:
    assert struck.run.manifest["attempt"] == 3
    assert_as_if_nothing_had_been(struck.run, quiet)


@dataclass(frozen=True)
class Strike:
    """Who is killed while a worker is held where."""

    hold: Hold
    victim: tuple[str, int] | None = None  # role and rank; None: the worker that is held


def held_in(method: str, function: str, *, rank: int = 0, time: int = 1, step: int = 0) -> Strike:
    return Strike(Hold(method, function, rank=rank, time=time, step=step))


def during_save(role: str, rank: int, *, step: int) -> Strike:
    return Strike(Hold("Actor.save", "Snapshot.write", rank=1, step=step), (role, rank))


FROZEN = [
    held_in("Reward.judge", "ValueModel.forward"),
    held_in("Reference.logprobs", "Policy.forward"),
    held_in("Reward.samples", "Reward.samples", step=1),
    held_in("receive", "Rollout.load_weights", rank=1, step=1),
    held_in("Rollout.generate", "_Context.read", time=5, step=1),
    held_in("Reward.score", "ValueModel.forward", step=1),
    during_save("reward", 0, step=2),
    held_in("Rollout.answer", "_Context.read", rank=1, step=3),
    during_save("reference", 0, step=4),
    during_save("rollout", 0, step=6),
]
LEARNING = [
    held_in("Actor.logprobs", "Policy.forward", rank=1),  # there is no checkpoint yet
    held_in("Critic.values", "ValueModel.forward"),
    held_in("send", "Link._wait", step=1),
    held_in("Critic.update", "Engine.step", time=2, step=1),
    held_in("Actor.save", "Snapshot.write", step=2),
    held_in("Critic.save", "Snapshot.write", step=2),
    held_in("Actor.update", "Engine.step", time=3, step=3),
    held_in("Actor.load", "Engine.load", rank=1, step=3),
    held_in("Critic.load", "Engine.load", step=3),
    during_save("critic", 0, step=4),
    during_save("actor", 0, step=6),
    held_in("Critic.export", "gather_weights", step=6),
]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("strikes", [FROZEN, LEARNING], ids=["frozen", "learning"])
def test_a_death_in_any_phase_changes_no_number(
    quiet: Run, parts: Parts, tmp_path: Path, strikes: list[Strike]
) -> None:
    write_config(tmp_path, parts, "cluster.max_failures=-1")
    with Command(tmp_path) as command:
        for strike in strikes:
            print(strike)
            command.hold(strike.hold)
            if command.process is None:
                command.start()
            held = command.wait_until_held()
            kill(held if strike.victim is None else command.pid_of(*strike.victim))
        command.release()
        command.join()
    print(command.said())
    assert command.said().count("the pool is rebuilt") >= len(strikes)
    assert_as_if_nothing_had_been(command.run, quiet)

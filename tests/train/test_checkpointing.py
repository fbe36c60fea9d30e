"""When a checkpoint is written, and when it counts; without Ray."""

from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
import torch.distributed as dist

from medgpt.artifacts import committed
from medgpt.config.base import ConfigError
from medgpt.engine.setup import join_process_group
from medgpt.runs import Run
from medgpt.train.checkpointing import Saver

POSITION = {"step": 5, "best_step": 0}


class SlowSnapshot:
    """Writes its file when it is told to."""

    def __init__(self) -> None:
        self.go = Event()
        self.error: Exception | None = None

    def write(self, directory: Path) -> list[str]:
        self.go.wait(10)
        (directory / "weights").write_bytes(b"0123456789")
        if self.error:
            raise self.error
        return ["weights"]


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    join_process_group(torch.device("cpu"))
    yield
    assert dist.get_world_size() == 1


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(str(tmp_path / "run"))
    run.update_manifest(attempt=1)
    return run


def begun(run: Run, snapshot: Any) -> Saver:
    saver = Saver(run, attempt=1, keep=2)
    saver.begin(lambda: snapshot, dict(POSITION), before=lambda: None)
    return saver


def test_training_goes_on_while_a_checkpoint_is_written(run: Run) -> None:
    snapshot = SlowSnapshot()
    saver = begun(run, snapshot)
    assert not saver.written
    assert run.newest_checkpoint() is None
    snapshot.go.set()
    saver.thread.submit(lambda: None).result(10)
    assert saver.written
    assert run.newest_checkpoint() is None  # until all ranks have met
    metrics = saver.finish()
    newest = run.newest_checkpoint()
    assert newest is not None
    assert newest[1]["position"] == POSITION
    assert metrics["checkpoint/bytes"] == 10
    assert 0 < metrics["time/checkpoint_stall_s"] <= metrics["time/checkpoint_s"]
    assert not saver.written
    assert saver.pending is None


def test_what_comes_before_the_files_is_written_before_them(run: Run) -> None:
    order: list[str] = []

    class Snapshot:
        def write(self, directory: Path) -> list[str]:
            order.append("files")
            return []

    saver = Saver(run, attempt=1, keep=2)
    saver.begin(Snapshot, dict(POSITION), before=lambda: order.append("audit"))  # type: ignore[arg-type]
    saver.finish()
    assert order == ["audit", "files"]


def test_a_full_disk_removes_what_was_half_written(run: Run) -> None:
    snapshot = SlowSnapshot()
    snapshot.error = OSError(28, "No space left on device")
    snapshot.go.set()
    with pytest.raises(ConfigError, match="No space left on device while writing checkpoints/step"):
        begun(run, snapshot).finish()
    assert run.checkpoint_steps() == []


def test_an_attempt_that_was_replaced_commits_nothing(run: Run) -> None:
    snapshot = SlowSnapshot()
    snapshot.go.set()
    saver = begun(run, snapshot)
    run.update_manifest(attempt=2)
    with pytest.raises(RuntimeError, match="attempt 2 of the run has begun"):
        saver.finish()
    assert committed(run.checkpoint(5)) is None


def test_an_attempt_that_was_given_up_removes_no_checkpoint_of_the_next(run: Run) -> None:
    snapshot = SlowSnapshot()
    snapshot.go.set()
    begun(run, snapshot).finish()
    run.update_manifest(attempt=2)
    with pytest.raises(RuntimeError, match="attempt 2 of the run has begun"):
        begun(run, snapshot)
    assert run.newest_checkpoint() is not None

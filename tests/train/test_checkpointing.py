"""Asynchronous checkpoints and their commit, without Ray."""

from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
import torch.distributed as dist

from medgpt.artifacts import committed
from medgpt.config.base import ConfigError
from medgpt.engine.setup import ensure_process_group
from medgpt.runs import Run
from medgpt.train.checkpointing import AsyncCheckpointer

STATE = {"step": 5, "best_step": 0}


class SlowSnapshot:
    """Writes its file when `may_finish` is set."""

    def __init__(self) -> None:
        self.may_finish = Event()
        self.error: Exception | None = None

    def write(self, directory: Path) -> list[str]:
        self.may_finish.wait(10)
        (directory / "weights").write_bytes(b"0123456789")
        if self.error:
            raise self.error
        return ["weights"]


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    ensure_process_group(torch.device("cpu"))
    yield
    assert dist.get_world_size() == 1


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(str(tmp_path / "run"))
    run.update_manifest(attempt=1)
    return run


def begin_checkpoint(run: Run, snapshot: Any) -> AsyncCheckpointer:
    checkpointer = AsyncCheckpointer(run, attempt=1, keep=2)
    checkpointer.begin(lambda: snapshot, dict(STATE), write_before=lambda: None)
    return checkpointer


def test_training_continues_while_a_checkpoint_is_written(run: Run) -> None:
    snapshot = SlowSnapshot()
    checkpointer = begin_checkpoint(run, snapshot)
    assert not checkpointer.is_written
    assert run.newest_checkpoint() is None
    snapshot.may_finish.set()
    checkpointer.executor.submit(lambda: None).result(10)
    assert checkpointer.is_written
    assert run.newest_checkpoint() is None  # not committed yet
    metrics = checkpointer.finish()
    newest = run.newest_checkpoint()
    assert newest is not None
    assert newest[1]["position"] == STATE
    assert metrics["checkpoint/bytes"] == 10
    assert 0 < metrics["time/checkpoint_stall_s"] <= metrics["time/checkpoint_s"]
    assert not checkpointer.is_written
    assert checkpointer.pending is None


def test_the_audit_is_written_before_the_checkpoint_files(run: Run) -> None:
    order: list[str] = []

    class Snapshot:
        def write(self, directory: Path) -> list[str]:
            order.append("files")
            return []

    checkpointer = AsyncCheckpointer(run, attempt=1, keep=2)
    checkpointer.begin(Snapshot, dict(STATE), write_before=lambda: order.append("audit"))  # type: ignore[arg-type]
    checkpointer.finish()
    assert order == ["audit", "files"]


def test_a_full_disk_removes_the_partial_checkpoint(run: Run) -> None:
    snapshot = SlowSnapshot()
    snapshot.error = OSError(28, "No space left on device")
    snapshot.may_finish.set()
    with pytest.raises(ConfigError, match="No space left on device while writing checkpoints/step"):
        begin_checkpoint(run, snapshot).finish()
    assert run.checkpoint_steps() == []


def test_a_replaced_attempt_commits_no_checkpoint(run: Run) -> None:
    snapshot = SlowSnapshot()
    snapshot.may_finish.set()
    checkpointer = begin_checkpoint(run, snapshot)
    run.update_manifest(attempt=2)
    with pytest.raises(RuntimeError, match="attempt 2 of the run has begun"):
        checkpointer.finish()
    assert committed(run.checkpoint(5)) is None


def test_a_replaced_attempt_removes_no_checkpoint_of_its_successor(run: Run) -> None:
    snapshot = SlowSnapshot()
    snapshot.may_finish.set()
    begin_checkpoint(run, snapshot).finish()
    run.update_manifest(attempt=2)
    with pytest.raises(RuntimeError, match="attempt 2 of the run has begun"):
        begin_checkpoint(run, snapshot)
    assert run.newest_checkpoint() is not None

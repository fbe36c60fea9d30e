"""Asynchronous checkpoints: each rank writes its files in a thread, rank 0 commits them."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.distributed as dist

from medgpt.artifacts import FileEntry, Folder, commit, file_entries
from medgpt.config.base import ConfigError
from medgpt.disk import storage_errors
from medgpt.engine.checkpoint import Snapshot
from medgpt.runs import Run
from medgpt.train.collectives import all_gather, broadcast, raise_on_all_ranks


class Checkpoint(NamedTuple):
    """A complete checkpoint."""

    url: str
    state: dict[str, Any]
    world_size: int  # ranks that wrote it


def newest_checkpoint(run: Run) -> Checkpoint | None:
    """Return the newest complete checkpoint, which rank 0 looks up. Collective."""
    newest = run.newest_checkpoint() if dist.get_rank() == 0 else None
    return broadcast(
        newest and Checkpoint(newest[0].url, newest[1]["position"], newest[1]["world_size"])
    )


def begin_attempt(run: Run) -> int:
    """Record a new start of the run and return its number, from 1. Collective."""
    attempt = 0
    if dist.get_rank() == 0:
        attempt = run.manifest["attempt"] + 1
        run.update_manifest(attempt=attempt, world_size=dist.get_world_size())
    return broadcast(attempt)


@dataclass
class PendingCheckpoint:
    """A checkpoint while it is written."""

    folder: Folder
    state: dict[str, Any]
    files: Future[list[FileEntry]]  # this rank's
    began: float
    stall_s: float  # seconds that training has waited


class AsyncCheckpointer:
    """Writes one rank's part of the checkpoints of an attempt, one at a time."""

    def __init__(self, run: Run, *, attempt: int, keep: int) -> None:
        self.run, self.attempt, self.keep = run, attempt, keep
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: PendingCheckpoint | None = None

    @property
    def is_written(self) -> bool:
        """Whether this rank has written its part of the pending checkpoint."""
        return self.pending is not None and self.pending.files.done()

    def begin(
        self,
        take_snapshot: Callable[[], Snapshot],
        state: dict[str, Any],
        write_before: Callable[[], None],
    ) -> None:
        """Start to write a snapshot, after `write_before`. Raises ConfigError on all ranks."""
        assert self.pending is None
        began = time.monotonic()
        folder = self.run.checkpoint(state["step"])
        errors: list[ConfigError] = []
        if self.rank == 0:
            with self._storage_errors(folder, errors):
                # or the next line could remove a newer attempt's checkpoint
                self._check_attempt_is_newest()
                folder.remove()  # remains of an attempt that died while writing
        raise_on_all_ranks(errors)
        files = self.executor.submit(self._write, folder, take_snapshot(), write_before)
        self.pending = PendingCheckpoint(
            folder, dict(state), files, began, time.monotonic() - began
        )

    def finish(self) -> dict[str, float]:
        """Wait for all ranks, commit, return metrics. Raises ConfigError on all of them."""
        pending, self.pending = self.pending, None
        assert pending is not None
        began = time.monotonic()
        rank_files: list[FileEntry] = []
        rank_errors: list[ConfigError] = []
        with self._storage_errors(pending.folder, rank_errors):
            rank_files = pending.files.result()
        parts = all_gather((rank_files, rank_errors))
        files = [file for part, _ in parts for file in part]
        errors = [error for _, part in parts for error in part]
        if self.rank == 0:
            self._commit_or_remove(pending, files, errors)
        raise_on_all_ranks(errors)
        now = time.monotonic()
        return {
            "checkpoint/bytes": sum(file.size for file in files),
            "time/checkpoint_s": now - pending.began,
            "time/checkpoint_stall_s": pending.stall_s + now - began,
        }

    def _write(
        self, folder: Folder, snapshot: Snapshot, write_before: Callable[[], None]
    ) -> list[FileEntry]:
        with self._storage_errors(folder):
            write_before()
            with folder.staging() as directory:
                return file_entries(directory, snapshot.write(directory))

    def _commit_or_remove(
        self, pending: PendingCheckpoint, files: list[FileEntry], errors: list[ConfigError]
    ) -> None:
        """Commit and prune, or remove the files after an error. Adds its own errors to `errors`."""
        folder, state = pending.folder, pending.state
        with self._storage_errors(folder, errors):
            if not errors:
                self._check_attempt_is_newest()
                commit(folder, files, position=state, world_size=self.world_size)
        with self._storage_errors(folder, errors):
            if errors:
                folder.remove()
            else:
                self.run.prune_checkpoints(
                    newest=state["step"], keep=self.keep, best_step=state["best_step"]
                )

    def _storage_errors(
        self, folder: Folder, kept: list[ConfigError] | None = None
    ) -> AbstractContextManager[None]:
        return storage_errors(self.run.folder.url, f"checkpoints/{folder.name}", kept)

    def _check_attempt_is_newest(self) -> None:
        """Raise RuntimeError if a newer attempt has begun, as after a network partition."""
        newest_attempt = self.run.manifest["attempt"]
        if newest_attempt != self.attempt:
            raise RuntimeError(
                f"attempt {newest_attempt} of the run has begun, attempt {self.attempt} ends"
            )

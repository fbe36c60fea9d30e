"""Asynchronous checkpoints: each rank writes its files in a thread, rank 0 commits them."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from medgpt.artifacts import FileEntry, Folder, commit, file_entries
from medgpt.config.base import ConfigError
from medgpt.disk import storage_errors
from medgpt.engine.checkpoint import Snapshot
from medgpt.runs import Run


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
        """Take a snapshot and start to write it, after `write_before`. Collective.

        Raises:
            ConfigError: on all ranks, if the store does not answer.
        """
        assert self.pending is None
        began = time.monotonic()
        folder = self.run.checkpoint(state["step"])
        failure = None
        if self.rank == 0:
            try:
                with storage_errors(self.run.folder.url, _display_name(folder)):
                    # or the next line could remove a newer attempt's checkpoint
                    self._check_attempt_is_newest()
                    folder.remove()  # remains of an attempt that died while writing
            except ConfigError as error:
                failure = error
        raise_on_all_ranks(failure)
        files = self.executor.submit(self._write, folder, take_snapshot(), write_before)
        self.pending = PendingCheckpoint(
            folder, dict(state), files, began, time.monotonic() - began
        )

    def finish(self) -> dict[str, float]:
        """Wait for all ranks and commit. Returns metrics of the checkpoint. Collective.

        Raises:
            ConfigError: on all ranks, if a disk was full or the store did not answer. The files
                are removed now or when the run resumes.
        """
        pending, self.pending = self.pending, None
        assert pending is not None
        began = time.monotonic()
        result: list[FileEntry] | ConfigError
        try:
            result = pending.files.result()
        except ConfigError as error:
            result = error
        results: list[Any] = [None] * self.world_size
        dist.all_gather_object(results, result)
        failure = next((part for part in results if isinstance(part, ConfigError)), None)
        if self.rank == 0:
            files = [] if failure else [file for part in results for file in part]
            failure = self._commit_or_remove(pending, files, failure)
        raise_on_all_ranks(failure)
        now = time.monotonic()
        return {
            "checkpoint/bytes": sum(file.size for part in results for file in part),
            "time/checkpoint_s": now - pending.began,
            "time/checkpoint_stall_s": pending.stall_s + now - began,
        }

    def _write(
        self, folder: Folder, snapshot: Snapshot, write_before: Callable[[], None]
    ) -> list[FileEntry]:
        with storage_errors(self.run.folder.url, _display_name(folder)):
            write_before()
            with folder.staging() as directory:
                return file_entries(directory, snapshot.write(directory))

    def _commit_or_remove(
        self, pending: PendingCheckpoint, files: list[FileEntry], failure: ConfigError | None
    ) -> ConfigError | None:
        """Commit and prune, or remove the files after a failure. Returns the first failure.

        The files of a committed checkpoint stay even if pruning fails.
        """
        state, name = pending.state, _display_name(pending.folder)
        try:
            with storage_errors(self.run.folder.url, name):
                if failure is None:
                    self._commit(pending, files)
        except ConfigError as error:
            failure = error
        try:
            with storage_errors(self.run.folder.url, name):
                if failure is not None:
                    pending.folder.remove()
                else:
                    self.run.prune_checkpoints(
                        newest=state["step"], keep=self.keep, best_step=state["best_step"]
                    )
        except ConfigError as error:
            failure = failure or error
        return failure

    def _check_attempt_is_newest(self) -> None:
        """Raise RuntimeError if a newer attempt has begun, as after a network partition."""
        newest_attempt = self.run.manifest["attempt"]
        if newest_attempt != self.attempt:
            raise RuntimeError(
                f"attempt {newest_attempt} of the run has begun, attempt {self.attempt} ends"
            )

    def _commit(self, pending: PendingCheckpoint, files: list[FileEntry]) -> None:
        self._check_attempt_is_newest()
        commit(pending.folder, files, position=pending.state, world_size=self.world_size)


def raise_on_all_ranks(error: ConfigError | None) -> None:
    """Raise on all ranks the error of the first rank that has one. Collective."""
    errors: list[ConfigError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for rank_error in errors:
        if rank_error is not None:
            raise rank_error


def _display_name(folder: Folder) -> str:
    return "/".join(folder.url.rsplit("/", 2)[1:])

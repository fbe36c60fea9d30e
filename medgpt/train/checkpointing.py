"""Checkpoints while training goes on: each rank writes its files in a thread, rank 0 commits."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from medgpt.artifacts import FileEntry, Folder, commit, entries
from medgpt.config.base import ConfigError
from medgpt.disk import storage_errors
from medgpt.engine.checkpoint import Snapshot
from medgpt.runs import Run


@dataclass
class Pending:
    """A checkpoint that is being written."""

    folder: Folder
    position: dict[str, Any]
    files: Future[list[FileEntry]]  # of this rank
    began: float
    stall_s: float  # that training waited so far


class Saver:
    """One rank's part in the checkpoints of an attempt; one is written at a time."""

    def __init__(self, run: Run, *, attempt: int, keep: int) -> None:
        self.run, self.attempt, self.keep = run, attempt, keep
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Pending | None = None

    @property
    def written(self) -> bool:
        """This rank has done its part of the pending checkpoint, which can be committed."""
        return self.pending is not None and self.pending.files.done()

    def begin(
        self, take: Callable[[], Snapshot], position: dict[str, Any], before: Callable[[], None]
    ) -> None:
        """Take a snapshot and start to write it, after `before`. Collective; none is pending.

        Raises:
            ConfigError: on all ranks, if the store does not answer.
        """
        assert self.pending is None
        began = time.monotonic()
        folder = self.run.checkpoint(position["step"])
        refusal = None
        if self.rank == 0:
            try:
                with storage_errors(self.run.folder.url, _name(folder)):
                    self._check_newest()  # its checkpoint of this step is not ours to remove
                    folder.remove()  # of an attempt that died while writing it
            except ConfigError as error:
                refusal = error
        raise_together(refusal)
        files = self.thread.submit(self._write, folder, take(), before)
        self.pending = Pending(folder, dict(position), files, began, time.monotonic() - began)

    def finish(self) -> dict[str, float]:
        """Wait for all ranks and commit. Collective. Returns metrics of the checkpoint.

        Raises:
            ConfigError: on all ranks, if the disk of one was full or its store did not answer; the
                files are gone then, or will be when the run is resumed.
        """
        pending, self.pending = self.pending, None
        assert pending is not None
        began = time.monotonic()
        part: list[FileEntry] | ConfigError
        try:
            part = pending.files.result()
        except ConfigError as error:
            part = error
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, part)
        refusal = next((part for part in parts if isinstance(part, ConfigError)), None)
        if self.rank == 0:
            files = [] if refusal else [file for part in parts for file in part]
            refusal = self._conclude(pending, files, refusal)
        raise_together(refusal)
        now = time.monotonic()
        return {
            "checkpoint/bytes": sum(file.size for part in parts for file in part),
            "time/checkpoint_s": now - pending.began,
            "time/checkpoint_stall_s": pending.stall_s + now - began,
        }

    def _write(
        self, folder: Folder, snapshot: Snapshot, before: Callable[[], None]
    ) -> list[FileEntry]:
        with storage_errors(self.run.folder.url, _name(folder)):
            before()
            with folder.staging() as directory:
                return entries(directory, snapshot.write(directory))

    def _conclude(
        self, pending: Pending, files: list[FileEntry], refusal: ConfigError | None
    ) -> ConfigError | None:
        """Commit and prune, or remove what was written; what one of the ranks or the store refused.

        Files of a checkpoint that is committed stay, whatever comes then.
        """
        position, name = pending.position, _name(pending.folder)
        try:
            with storage_errors(self.run.folder.url, name):
                if refusal is None:
                    self._commit(pending, files)
        except ConfigError as error:
            refusal = error
        try:
            with storage_errors(self.run.folder.url, name):
                if refusal is not None:
                    pending.folder.remove()
                else:
                    self.run.prune_checkpoints(
                        newest=position["step"], keep=self.keep, best_step=position["best_step"]
                    )
        except ConfigError as error:
            refusal = refusal or error
        return refusal

    def _check_newest(self) -> None:
        """Raises RuntimeError in an attempt that was given up, as after a network partition."""
        newest = self.run.manifest["attempt"]
        if newest != self.attempt:
            raise RuntimeError(
                f"attempt {newest} of the run has begun, attempt {self.attempt} ends"
            )

    def _commit(self, pending: Pending, files: list[FileEntry]) -> None:
        self._check_newest()
        commit(pending.folder, files, position=pending.position, world_size=self.world_size)


def raise_together(error: ConfigError | None) -> None:
    """Raise on all ranks what one of them met. Collective."""
    errors: list[ConfigError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for met in errors:
        if met is not None:
            raise met


def _name(folder: Folder) -> str:
    return "/".join(folder.url.rsplit("/", 2)[1:])

"""The status of every trial, in a file beside its run, so that a killed search repeats no trial.

The record of Ray Tune itself is not read: it is written every few seconds only, and it is a pickle.
"""

from dataclasses import asdict, dataclass, replace
from typing import Literal

from pydantic import TypeAdapter

from medgpt.artifacts import Folder
from medgpt.config.tune import Params
from medgpt.runs import Run

SUFFIX = ".json"
Status = Literal["running", "finished", "stopped", "diverged", "refused", "failed"]
DONE_STATUSES: tuple[Status, ...] = ("finished", "stopped", "diverged", "refused")


@dataclass(frozen=True)
class StateCopy:
    """The trial copied the state of another trial, and continued from `iteration` with `params`."""

    trial: str
    iteration: int
    params: Params


@dataclass(frozen=True)
class TrialRecord:
    """A trial. Trials of a search are named by their number in three digits."""

    name: str
    params: Params
    status: Status = "running"
    why: str = ""
    copied: tuple[StateCopy, ...] = ()

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to train."""
        return self.status in DONE_STATUSES


def trial_name(number: int) -> str:
    return f"{number:03d}"


class TrialRecords:
    """The records of the trials in a folder, each beside its run directory."""

    def __init__(self, url: str) -> None:
        self.folder = Folder(url)

    def run(self, name: str) -> Run:
        return Run((self.folder / name).url)

    def read(self, name: str) -> TrialRecord | None:
        file = f"{name}{SUFFIX}"
        return self._read(file) if self.folder.exists(file) else None

    def all(self) -> list[TrialRecord]:
        """Return all records by name."""
        names = [name for name in self.folder.names() if name.endswith(SUFFIX)]
        return [self._read(name) for name in names]

    def _read(self, file: str) -> TrialRecord:
        return TypeAdapter(TrialRecord).validate_python(self.folder.read_json(file))

    def write(self, record: TrialRecord) -> TrialRecord:
        self.folder.write_json(f"{record.name}{SUFFIX}", asdict(record))
        return record

    def end_if_running(self, name: str, status: Status, why: str) -> None:
        """Record how Ray Tune ended a trial, unless the trial has recorded its own end."""
        record = self.read(name)
        if record is not None and not record.is_done:
            self.write(replace(record, status=status, why=why))

"""Runs at the start of every worker of a test's run: lets a test hold a worker in a phase.

Ray calls `install` (runtime_env's worker_process_setup_hook). Nothing of medgpt is changed: Python
itself tells when a worker receives a method of its role, and then which functions it calls. In the
middle of the one that the test waits for, the worker says so in a file and waits for what comes.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tests.train.hooks import steps_logged

FOLDER = "MEDGPT_TEST_HOLD"  # where the files of tests and workers are
HOLD, HELD = "hold.json", "held.json"
# modules of what a pool is told to do
ROLES, LINK = "medgpt.rlhf.roles.", "medgpt.rlhf.weight_sync.process_group"


@dataclass(frozen=True)
class Hold:
    """Where a worker is to be held: in the `time`-th call of `function` inside of `method`, the
    first time after the run has logged so many steps."""

    method: str  # of a role, as Actor.update, or a function of weight_sync.process_group
    function: str  # qualified name
    rank: int = 0
    time: int = 1
    step: int = 0
    number: int = 0  # tells it from earlier ones


def install() -> None:
    folder = Path(os.environ[FOLDER])

    def before(event: str, args: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":  # a call's method arrives pickled by its name
            module, name = map(str, args)
            if module == LINK or (module.startswith(ROLES) and "." in name):
                told(folder, module, name)

    sys.addaudithook(before)


def told(folder: Path, module: str, method: str) -> None:
    """This worker is about to run `method`."""
    rank = int(os.environ["RANK"])
    sys.setprofile(None)  # of an earlier method
    if module.startswith(ROLES):
        role = module.removeprefix(ROLES)
        pid_file(folder, role, rank).write_text(str(os.getpid()))
    hold = pending(folder)
    if hold is None or (hold.method, hold.rank) != (method, rank):
        return
    if max(0, steps_logged(folder / "run" / "metrics.jsonl")) >= hold.step:
        watch(folder, hold)


def watch(folder: Path, hold: Hold) -> None:
    """Wait in the call of the function, for as long as the test wants this worker held."""
    calls = 0

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls
        if event == "call" and frame.f_code.co_qualname == hold.function:
            calls += 1
            if calls == hold.time:
                sys.setprofile(None)
                write(folder / HELD, {"number": hold.number, "pid": os.getpid()})
                while pending(folder) == hold:
                    time.sleep(0.02)

    sys.setprofile(profile)


def pending(folder: Path) -> Hold | None:
    path = folder / HOLD
    return Hold(**json.loads(path.read_text())) if path.exists() else None


def order(folder: Path, hold: Hold | None) -> None:
    """Hold there, or nowhere; who is held elsewhere goes on."""
    if hold is None:
        (folder / HOLD).unlink(missing_ok=True)
    else:
        write(folder / HOLD, asdict(hold))


def pid_file(folder: Path, role: str, rank: int) -> Path:
    return folder / f"{role}-{rank}.pid"


def write(path: Path, value: object) -> None:
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(value))
    partial.replace(path)

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

from tests.train.worker_hooks import last_logged_step

FOLDER_VARIABLE = "MEDGPT_TEST_HOLD"  # variable with the folder shared by tests and workers
HOLD_FILE, HELD_FILE = "hold.json", "held.json"
# modules whose methods pools call
ROLES, WEIGHT_SYNC = "medgpt.rlhf.roles.", "medgpt.rlhf.weight_sync.process_group"


@dataclass(frozen=True)
class Hold:
    """Where to hold a worker: in the `time`-th call of `function` inside `method`, once the run has
    logged `step` steps."""

    method: str  # of a role, such as Actor.update, or a function of weight_sync.process_group
    function: str  # qualified name
    rank: int = 0
    time: int = 1
    step: int = 0
    number: int = 0  # distinguishes it from earlier holds


def install() -> None:
    folder = Path(os.environ[FOLDER_VARIABLE])

    def before(event: str, args: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":  # a call's method arrives pickled by its name
            module, name = map(str, args)
            if module == WEIGHT_SYNC or (module.startswith(ROLES) and "." in name):
                on_method(folder, module, name)

    sys.addaudithook(before)


def on_method(folder: Path, module: str, method: str) -> None:
    """Called before this worker runs `method`; arms the hold if it applies."""
    rank = int(os.environ["RANK"])
    sys.setprofile(None)  # of an earlier method
    if module.startswith(ROLES):
        role = module.removeprefix(ROLES)
        pid_file(folder, role, rank).write_text(str(os.getpid()))
    hold = read_hold(folder)
    if hold is None or (hold.method, hold.rank) != (method, rank):
        return
    if max(0, last_logged_step(folder / "run" / "metrics.jsonl")) >= hold.step:
        hold_in_call(folder, hold)


def hold_in_call(folder: Path, hold: Hold) -> None:
    """Block in the chosen call of the function until the test releases the worker."""
    calls = 0

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls
        if event == "call" and frame.f_code.co_qualname == hold.function:
            calls += 1
            if calls == hold.time:
                sys.setprofile(None)
                write_json(folder / HELD_FILE, {"number": hold.number, "pid": os.getpid()})
                while read_hold(folder) == hold:
                    time.sleep(0.02)

    sys.setprofile(profile)


def read_hold(folder: Path) -> Hold | None:
    path = folder / HOLD_FILE
    return Hold(**json.loads(path.read_text())) if path.exists() else None


def write_hold(folder: Path, hold: Hold | None) -> None:
    """Request this hold, or none; a worker held elsewhere continues."""
    if hold is None:
        (folder / HOLD_FILE).unlink(missing_ok=True)
    else:
        write_json(folder / HOLD_FILE, asdict(hold))


def pid_file(folder: Path, role: str, rank: int) -> Path:
    return folder / f"{role}-{rank}.pid"


def write_json(path: Path, value: object) -> None:
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(value))
    partial.replace(path)

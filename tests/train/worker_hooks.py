"""Hooks in every process of a test cluster: pause a run at a step limit and slow down data tasks.

Ray calls `install` (runtime_env's worker_process_setup_hook). A Python audit hook waits when rank 0
opens metrics.jsonl to log a step beyond the limit. Data tasks are made small and slow, so that some
run at any time, as on a large corpus.
"""

import functools
import importlib.machinery
import os
import sys
import time
from pathlib import Path
from typing import Any

STEP_LIMIT_FILE = "MEDGPT_TEST_STEP_LIMIT_FILE"  # its file holds the last step that may be logged
TAIL_BYTES = 4096
STREAM = "medgpt.data.loader.stream"
TOKENS_PER_TASK = 256
TASKS_PER_PIPELINE = 4
TASK_S = 0.2


def install() -> None:
    step_limit_file = Path(os.environ[STEP_LIMIT_FILE])

    def wait_at_step_limit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and str(args[0]).endswith("metrics.jsonl") and args[1] == "a":
            while last_logged_step(Path(str(args[0]))) >= int(step_limit_file.read_text()):
                time.sleep(0.05)

    sys.addaudithook(wait_at_step_limit)
    sys.meta_path.insert(0, SmallSlowTasks())


class SmallSlowTasks:
    """Import hook that shrinks and slows down the tasks of the data stream."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == STREAM else None
        if spec is not None:
            loader: Any = spec.loader
            loader.exec_module = functools.partial(self._exec, loader.exec_module)
        return spec

    def _exec(self, exec_module: Any, module: Any) -> None:
        exec_module(module)
        module.TOKENS_PER_TASK, module.TASKS_PER_PIPELINE = TOKENS_PER_TASK, TASKS_PER_PIPELINE
        module.assemble_rows = _slow(module.assemble_rows)


def _slow(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        time.sleep(TASK_S)
        return function(*args, **kwargs)

    return call


def last_logged_step(path: Path) -> int:
    """Return the last step in metrics.jsonl, -1 if there is none."""
    if not path.exists():
        return -1
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]
    if not lines:
        return -1
    return int(lines[-1].split(b'"step": ')[1].split(b",")[0])

"""Runs at the start of every process of a test cluster: lets a test decide how far a run may go.

Ray calls `install` (runtime_env's worker_process_setup_hook). Nothing of medgpt is changed: Python
itself tells when rank 0 is about to log a step, and the run waits there.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

GATE = "MEDGPT_TEST_GATE"  # a file that holds the last step that may be logged
TAIL_BYTES = 4096


def install() -> None:
    gate = Path(os.environ[GATE])

    def before(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and str(args[0]).endswith("metrics.jsonl") and args[1] == "a":
            while steps_logged(Path(str(args[0]))) >= int(gate.read_text()):
                time.sleep(0.05)

    sys.addaudithook(before)


def steps_logged(path: Path) -> int:
    """The last step in metrics.jsonl."""
    if not path.exists():
        return -1
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]
    if not lines:
        return -1
    return int(lines[-1].split(b'"step": ')[1].split(b",")[0])

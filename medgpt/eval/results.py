"""What an evaluation leaves in its run directory."""

import json

from medgpt.eval.task import Judged
from medgpt.runs import Run

RESULTS = "results.json"
GATES = "gates.json"


def read_items(run: Run, name: str) -> list[Judged]:
    """items/NAME.jsonl"""
    # splitlines would also cut at U+2028 and its like, which JSON leaves inside texts
    *lines, _ = (run.folder / "items").read_text(f"{name}.jsonl").split("\n")
    return [Judged(**json.loads(line)) for line in lines]

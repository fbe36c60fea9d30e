"""What an evaluation leaves in its run directory."""

import json
from typing import Any

from medgpt.config.gates import REWARD
from medgpt.data.sources.rows import content_hash
from medgpt.eval.stats import wilson
from medgpt.eval.task import ItemResult
from medgpt.runs import Run
from medgpt.train.reward_eval import FINDINGS

RESULTS = "results.json"
GATES = "gates.json"
LENGTHS = ("words",)  # metrics that are no shares


def reward_results(run: Run) -> dict[str, Any]:
    """What a reward run found on held-out pairs, in the form of results.json.

    The interval takes prompts for independent, not the pairs of a prompt.
    """
    found, manifest = run.folder.read_json(FINDINGS), run.manifest
    n = found["samples"]
    score = wilson(round(found["accuracy"] * n), n) if n else None
    task = {
        "kind": REWARD,
        "n": n,
        "data_hash": content_hash(*(file["xxh128"] for file in manifest["data"]["inputs"])),
        "template": "pairs",
        "rules": "scores",
        "seed": manifest["seed"],
        "metrics": {"accuracy": {**score._asdict(), "value": found["accuracy"], "n": n}}
        if score
        else {},
        "slices": {},
    }
    return {"tasks": {REWARD: task}}


def read_items(run: Run, name: str) -> list[ItemResult]:
    """items/NAME.jsonl"""
    # splitlines would also cut at U+2028 and its like, which JSON leaves inside texts
    *lines, _ = (run.folder / "items").read_text(f"{name}.jsonl").split("\n")
    return [ItemResult(**json.loads(line)) for line in lines]

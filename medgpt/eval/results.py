"""Names and contents of the files that an evaluation writes to its run directory."""

from typing import Any

from medgpt.config.gates import REWARD_TASK
from medgpt.data.sources.sampling import hash_texts
from medgpt.eval.stats import wilson_interval
from medgpt.eval.task import ItemResult
from medgpt.runs import Run
from medgpt.train.reward_eval import REWARD_EVAL_FILE

RESULTS = "results.json"
GATES = "gates.json"
LENGTH_METRICS = ("words",)  # metrics that are not proportions


def reward_results(run: Run) -> dict[str, Any]:
    """Return the accuracy of a reward run on held-out pairs, in the format of results.json.

    The interval treats prompts as independent, not the pairs of one prompt.
    """
    reward_eval, manifest = run.folder.read_json(REWARD_EVAL_FILE), run.manifest
    n = reward_eval["samples"]
    score = wilson_interval(round(reward_eval["accuracy"] * n), n) if n else None
    task = {
        "kind": REWARD_TASK,
        "n": n,
        "data_hash": hash_texts(*(file["xxh128"] for file in manifest["data"]["inputs"])),
        "template": "pairs",
        "rules": "scores",
        "seed": manifest["seed"],
        "metrics": {"accuracy": {**score._asdict(), "value": reward_eval["accuracy"], "n": n}}
        if score
        else {},
        "slices": {},
    }
    return {"tasks": {REWARD_TASK: task}}


def read_items(run: Run, name: str) -> list[ItemResult]:
    """Read items/NAME.jsonl."""
    return [ItemResult(**item) for item in (run.folder / "items").read_jsonl(f"{name}.jsonl")]

"""Whether an evaluation reached what it had to, and the evidence."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medgpt.config import ConfigError
from medgpt.config.gates import Gate, parse_gate

Results = dict[str, Any]
"""results.json"""
MAIN = {  # what a slice is asked for if the gate names no metric
    "mcq": "accuracy",
    "nll": "nll_per_token",
    "generation": "rouge_l",
    "key_points": "passed",
    "triage": "accuracy",
}


class GateFailure(ConfigError):
    """The model did not reach what its gates demand."""


@dataclass(frozen=True)
class Evidence:
    """What a gate looked at."""

    gate: str
    passed: bool
    value: float
    low: float
    high: float
    n: int
    bound: float
    parent: float | None

    def __str__(self) -> str:
        than = "" if self.parent is None else f", the parent has {self.parent:.4f}"
        return (
            f"{self.gate}: {self.value:.4f} ({self.low:.4f} to {self.high:.4f}, 95 %, n={self.n})"
            f"{than}"
        )


def check_gates(gates: Sequence[str], results: Results, parent: Results | None) -> list[Evidence]:
    """Evidence for each gate.

    Raises:
        ConfigError: a gate names what was not measured, or compares with a parent that is not there
            or answered other questions.
    """
    return [_check(parse_gate(text), results, parent) for text in gates]


def require(evidence: Sequence[Evidence]) -> None:
    """Raises GateFailure, with the evidence, if a gate was not passed."""
    failed = [str(item) for item in evidence if not item.passed]
    if failed:
        raise GateFailure(f"failed {len(failed)} of {len(evidence)} gates: {'; '.join(failed)}")


def _check(gate: Gate, results: Results, parent: Results | None) -> Evidence:
    score, reference = find(gate, results), None
    if gate.needs_parent:
        reference = _of_parent(gate, results, parent)
    return Evidence(
        gate.text,
        gate.holds(score["value"], reference or 0.0),
        score["value"],
        score["low"],
        score["high"],
        int(score["n"]),
        gate.bound(reference or 0.0),
        reference,
    )


def _of_parent(gate: Gate, results: Results, parent: Results | None) -> float:
    if parent is None:
        raise ConfigError(
            f"gate {gate.text!r} compares with the parent and model.parent is unset; give the run "
            "directory of the parent's evaluation"
        )
    try:
        value = find(gate, parent)["value"]
    except ConfigError as error:
        raise ConfigError(f"model.parent: {error}") from None
    if parent["tasks"][gate.task]["data_hash"] != results["tasks"][gate.task]["data_hash"]:
        raise ConfigError(
            f"gate {gate.text!r}: the parent's evaluation asked other questions; score the parent "
            "on the same files with the same limit and seed"
        )
    return float(value)


def find(gate: Gate, results: Results) -> dict[str, float]:
    """The score that a gate names.

    Raises:
        ConfigError: there is none; the nearest name is told.
    """
    names = {
        name: score
        for task, result in results["tasks"].items()
        for name, score in _scores(task, result).items()
    }
    wanted = ".".join(gate.name)
    if wanted not in names:
        close = difflib.get_close_matches(wanted, names, n=1, cutoff=0.4)
        known = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
        raise ConfigError(f"gate {gate.text!r}: no score is called {wanted}; {known}")
    return names[wanted]


def _scores(task: str, result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Every score of a task by the names that a gate can use."""
    found: dict[str, dict[str, float]] = {}
    main = MAIN.get(result["kind"])
    for groups in result["slices"].values():
        for value, scores in groups.items():
            found |= {f"{task}.{value}.{metric}": score for metric, score in scores.items()}
            if main in scores:
                found[f"{task}.{value}"] = scores[main]
    return found | {f"{task}.{metric}": score for metric, score in result["metrics"].items()}

"""Whether an evaluation reached what it had to, and the evidence."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medgpt.config.base import ConfigError
from medgpt.config.gates import Gate, parse_gate

Results = dict[str, Any]
"""results.json"""
MAIN = {  # what a slice is asked for if the gate names no metric
    "mcq": "accuracy",
    "nll": "nll_per_token",
    "generation": "rouge_l",
    "key_points": "passed",
    "triage": "accuracy",
    "reward": "accuracy",
}


AGREE = {  # what two scores must have in common to be compared
    "data_hash": "asked other questions",
    "template": "asked in another way",
    "rules": "was read by other rules",
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
        gate.holds(score[gate.side], reference or 0.0),
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
    if reason := disagreement(results["tasks"][gate.task], parent["tasks"][gate.task]):
        raise ConfigError(
            f"gate {gate.text!r}: the parent's evaluation {reason}; score the parent again, with "
            "the same keys for this task"
        )
    return float(value)


def disagreement(task: dict[str, Any], other: dict[str, Any]) -> str | None:
    """Why another evaluation's scores of a task do not compare with these; None if they do."""
    for key, reason in AGREE.items():
        if task.get(key) != other.get(key):  # those of an older version lack some
            return reason
    return None


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
    if gate.name not in names:
        wanted, told = ".".join(gate.name), [".".join(name) for name in names]
        close = difflib.get_close_matches(wanted, told, n=1, cutoff=0.4)
        known = f"did you mean {close[0]}?" if close else f"there are {', '.join(told)}"
        raise ConfigError(f"gate {gate.text!r}: no score is called {wanted}; {known}")
    return names[gate.name]


def _scores(task: str, result: dict[str, Any]) -> dict[tuple[str, ...], dict[str, float]]:
    """Every score of a task by the names that a gate can use."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    main = MAIN.get(result["kind"])
    for groups in result["slices"].values():
        for value, scores in groups.items():
            found |= {(task, value, metric): score for metric, score in scores.items()}
            if main in scores:
                found[task, value] = scores[main]
    return found | {(task, metric): score for metric, score in result["metrics"].items()}

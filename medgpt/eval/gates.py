"""Whether an evaluation reached what it had to, and the evidence."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medgpt.config.base import ConfigError
from medgpt.config.gates import Gate, parse_gate

Results = dict[str, Any]
"""results.json"""
MAIN_METRICS = {  # what a slice is asked for if the gate names no metric
    "mcq": "accuracy",
    "nll": "nll_per_token",
    "generation": "rouge_l",
    "key_points": "passed",
    "triage": "accuracy",
    "reward": "accuracy",
}


MUST_MATCH = {  # what two scores must have in common to be compared
    "data_hash": "asked other questions",
    "template": "asked in another way",
    "rules": "was read by other rules",
}


class GateFailure(ConfigError):
    """The model did not reach what its gates demand."""


@dataclass(frozen=True)
class GateResult:
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
        comparison = "" if self.parent is None else f", the parent has {self.parent:.4f}"
        return (
            f"{self.gate}: {self.value:.4f} ({self.low:.4f} to {self.high:.4f}, 95 %, n={self.n})"
            f"{comparison}"
        )


def check_gates(gates: Sequence[str], results: Results, parent: Results | None) -> list[GateResult]:
    """Evidence for each gate.

    Raises:
        ConfigError: a gate names what was not measured, or compares with a parent that is not there
            or answered other questions.
    """
    return [_check_gate(parse_gate(gate), results, parent) for gate in gates]


def require_passed(gate_results: Sequence[GateResult]) -> None:
    """Raises GateFailure, with the evidence, if a gate was not passed."""
    failed = [str(item) for item in gate_results if not item.passed]
    if failed:
        raise GateFailure(f"failed {len(failed)} of {len(gate_results)} gates: {'; '.join(failed)}")


def _check_gate(gate: Gate, results: Results, parent: Results | None) -> GateResult:
    score, parent_value = find_score(gate, results), None
    if gate.needs_parent:
        parent_value = _parent_value(gate, results, parent)
    return GateResult(
        gate.text,
        gate.is_passed(score[gate.side], parent_value or 0.0),
        score["value"],
        score["low"],
        score["high"],
        int(score["n"]),
        gate.bound(parent_value or 0.0),
        parent_value,
    )


def _parent_value(gate: Gate, results: Results, parent: Results | None) -> float:
    if parent is None:
        raise ConfigError(
            f"gate {gate.text!r} compares with the parent and model.parent is unset; give the run "
            "directory of the parent's evaluation"
        )
    try:
        value = find_score(gate, parent)["value"]
    except ConfigError as error:
        raise ConfigError(f"model.parent: {error}") from None
    if reason := why_not_comparable(results["tasks"][gate.task], parent["tasks"][gate.task]):
        raise ConfigError(
            f"gate {gate.text!r}: the parent's evaluation {reason}; score the parent again, with "
            "the same keys for this task"
        )
    return float(value)


def why_not_comparable(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """Why another evaluation's scores of a task do not compare with these; None if they do."""
    for key, reason in MUST_MATCH.items():
        if ours.get(key) != theirs.get(key):  # those of an older version lack some
            return reason
    return None


def find_score(gate: Gate, results: Results) -> dict[str, float]:
    """The score that a gate names.

    Raises:
        ConfigError: there is none; the nearest name is told.
    """
    scores = {
        name: score
        for task, result in results["tasks"].items()
        for name, score in _scores_by_name(task, result).items()
    }
    if gate.name not in scores:
        wanted, known_names = ".".join(gate.name), [".".join(name) for name in scores]
        nearest = difflib.get_close_matches(wanted, known_names, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(known_names)}"
        raise ConfigError(f"gate {gate.text!r}: no score is called {wanted}; {hint}")
    return scores[gate.name]


def _scores_by_name(task: str, result: dict[str, Any]) -> dict[tuple[str, ...], dict[str, float]]:
    """Every score of a task by the names that a gate can use."""
    scores_by_name: dict[tuple[str, ...], dict[str, float]] = {}
    main_metric = MAIN_METRICS.get(result["kind"])
    for groups in result["slices"].values():
        for value, scores in groups.items():
            scores_by_name |= {(task, value, metric): score for metric, score in scores.items()}
            if main_metric in scores:
                scores_by_name[task, value] = scores[main_metric]
    return scores_by_name | {(task, metric): score for metric, score in result["metrics"].items()}

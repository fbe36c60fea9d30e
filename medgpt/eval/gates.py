"""Checks the scores of an evaluation against its gates, such as `mcq.accuracy >= parent`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medgpt.config.base import ConfigError, did_you_mean
from medgpt.config.gates import Gate, parse_gate

Results = dict[str, Any]
"""The contents of results.json."""
MAIN_METRICS = {  # by kind of task: the metric of a slice if a gate names none
    "mcq": "accuracy",
    "nll": "nll_per_token",
    "generation": "rouge_l",
    "key_points": "passed",
    "triage": "accuracy",
    "reward": "accuracy",
}


MUST_MATCH = {  # keys in which two evaluations must agree to be compared
    "data_hash": "asked other questions",
    "template": "used another prompt",
    "rules": "was graded by other rules",
}


class GateFailure(ConfigError):
    """The model failed at least one gate."""


@dataclass(frozen=True)
class GateResult:
    """Outcome of one gate, as written to gates.json."""

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
    """Return the result of each gate.

    Raises:
        ConfigError: a gate names an unknown score, or compares with a parent that is missing or
            was evaluated in another way.
    """
    return [_check_gate(parse_gate(gate), results, parent) for gate in gates]


def require_passed(gate_results: Sequence[GateResult]) -> None:
    """Raise GateFailure with the scores of all failed gates, if there are any."""
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
            f"gate {gate.text!r} needs a parent, but model.parent is unset; set it to the "
            "run directory of the parent's evaluation"
        )
    try:
        value = find_score(gate, parent)["value"]
    except ConfigError as error:
        raise ConfigError(f"model.parent: {error}") from None
    if reason := why_not_comparable(results["tasks"][gate.task], parent["tasks"][gate.task]):
        raise ConfigError(
            f"gate {gate.text!r}: the parent's evaluation {reason}; evaluate the parent again "
            "with the same settings of this task"
        )
    return float(value)


def why_not_comparable(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """Return why two results of a task cannot be compared, or None if they can."""
    for key, reason in MUST_MATCH.items():
        if ours.get(key) != theirs.get(key):  # older versions did not write all keys
            return reason
    return None


def find_score(gate: Gate, results: Results) -> dict[str, float]:
    """Return the score that a gate names.

    Raises:
        ConfigError: there is no such score; the message suggests the nearest name.
    """
    scores = {
        name: score
        for task, result in results["tasks"].items()
        for name, score in _scores_by_name(task, result).items()
    }
    if gate.name not in scores:
        wanted, known_names = ".".join(gate.name), [".".join(name) for name in scores]
        hint = did_you_mean(wanted, known_names, cutoff=0.4)
        raise ConfigError(f"gate {gate.text!r}: no score is called {wanted}; {hint}")
    return scores[gate.name]


def _scores_by_name(task: str, result: dict[str, Any]) -> dict[tuple[str, ...], dict[str, float]]:
    """Return every score of a task, keyed by the names that a gate can use for it."""
    scores_by_name: dict[tuple[str, ...], dict[str, float]] = {}
    main_metric = MAIN_METRICS.get(result["kind"])
    for groups in result["slices"].values():
        for value, scores in groups.items():
            scores_by_name |= {(task, value, metric): score for metric, score in scores.items()}
            if main_metric in scores:
                scores_by_name[task, value] = scores[main_metric]
    return scores_by_name | {(task, metric): score for metric, score in result["metrics"].items()}

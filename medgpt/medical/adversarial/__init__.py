"""Precision and recall of each medical rule on answers that were written to fool it.

The cases of a rule were written before the rule, and every second one was held out while the rule
was developed: only the held-out figures are honest. One author wrote rules and cases, so the
figures say nothing about tricks that the author did not think of.
"""

import tomllib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from medgpt.config.ppo_rewards import RuleName
from medgpt.medical.red_flags import required_urgency
from medgpt.medical.rules import RULES
from medgpt.medical.triage import triage_questions

HELD_OUT_COMPLAINTS = {  # complaints of triage.toml that red_flags.toml was not developed on
    *("breathlessness", "allergic_reaction", "abdominal_pain", "diarrhoea", "pregnancy"),
    *("child_fever", "seizure", "back_pain", "eye", "exposure", "mental_health", "wound", "burn"),
    *("diabetes", "throat", "cough"),
}
TABLE_HEAD = (
    "| rule | violations | kept | precision | recall | precision, worked on | recall, worked on |"
)
Half = Literal["worked_on", "held_out"]


@dataclass(frozen=True, slots=True)
class Case:
    question: str
    answer: str
    violates: bool


@dataclass(frozen=True, slots=True)
class RuleMetrics:
    violations: int  # cases that violate the rule
    non_violations: int
    true_positives: int
    false_positives: int

    @property
    def recall(self) -> float:
        return self.true_positives / self.violations

    @property
    def precision(self) -> float:
        """1 for a rule that reports nothing."""
        num_reported = self.true_positives + self.false_positives
        return self.true_positives / num_reported if num_reported else 1.0


@cache
def read_cases(rule: RuleName, half: Half | None = None) -> tuple[Case, ...]:
    """Return the cases of a rule: one half of them, or all."""
    data = tomllib.loads((Path(__file__).parent / f"{rule}.toml").read_text("utf-8"))
    indices = {None: slice(None), "worked_on": slice(0, None, 2), "held_out": slice(1, None, 2)}
    return tuple(
        Case(question, answer, violates)
        for kind, violates in (("violates", True), ("keeps", False))
        for question, answer in data[kind][indices[half]]
    )


def rule_metrics(rule: RuleName, half: Half | None = None) -> RuleMetrics:
    return _count(
        (case.violates, RULES[rule](case.question, case.answer)) for case in read_cases(rule, half)
    )


def red_flag_metrics() -> RuleMetrics:
    """Return the figures for the emergency level on notes about held-out complaints."""
    return _count(
        (question.level == "emergency", required_urgency(question.text) == "emergency")
        for question in triage_questions(0)
        if question.complaint in HELD_OUT_COMPLAINTS
    )


def _count(outcomes: Iterable[tuple[bool, bool]]) -> RuleMetrics:
    """Count (is violation, is reported) pairs."""
    counts = Counter(outcomes)
    return RuleMetrics(
        violations=counts[True, True] + counts[True, False],
        non_violations=counts[False, True] + counts[False, False],
        true_positives=counts[True, True],
        false_positives=counts[False, True],
    )


def metrics_table() -> str:
    """Return a Markdown table of every rule: held-out figures beside those of the other half."""
    rows = [TABLE_HEAD, "|---" * 7 + "|"]
    for rule in get_args(RuleName):
        held_out, worked_on = rule_metrics(rule, "held_out"), rule_metrics(rule, "worked_on")
        tuned = f"{worked_on.precision:.2f} | {worked_on.recall:.2f}"
        rows.append(f"| {rule} {_table_cells(held_out)} | {tuned} |")
    rows.append(f"| red flags of other complaints {_table_cells(red_flag_metrics())} | | |")
    return "\n".join(rows)


def _table_cells(metrics: RuleMetrics) -> str:
    counts = f"| {metrics.violations} | {metrics.non_violations}"
    return f"{counts} | {metrics.precision:.2f} | {metrics.recall:.2f}"

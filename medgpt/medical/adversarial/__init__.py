"""How good the medical rules are on answers written to fool them: precision and recall of each.

Each rule's set was written before the rule. Every second case was left aside while the rule was
worked on; what it finds there is the honest figure. Its author wrote both, though, so it says what
the rule does with tricks that were thought of, and nothing about the others.
"""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from medgpt.config.rewards import RuleName

Half = Literal["worked_on", "held_out"]


@dataclass(frozen=True, slots=True)
class Case:
    question: str
    answer: str
    violates: bool


@dataclass(frozen=True, slots=True)
class Figures:
    violations: int  # in the set
    kept: int
    found: int
    false_alarms: int

    @property
    def recall(self) -> float:
        return self.found / self.violations

    @property
    def precision(self) -> float:
        """1 of a rule that never speaks."""
        spoken = self.found + self.false_alarms
        return self.found / spoken if spoken else 1.0


@cache
def cases(rule: RuleName, half: Half | None = None) -> tuple[Case, ...]:
    """Those of one half, or all."""
    data = tomllib.loads((Path(__file__).parent / f"{rule}.toml").read_text("utf-8"))
    first = {None: slice(None), "worked_on": slice(0, None, 2), "held_out": slice(1, None, 2)}
    return tuple(
        Case(question, answer, violates)
        for kind, violates in (("violates", True), ("keeps", False))
        for question, answer in data[kind][first[half]]
    )


def figures(rule: RuleName, half: Half | None = None) -> Figures:
    from medgpt.medical.rules import RULES

    told = [(case, RULES[rule](case.question, case.answer)) for case in cases(rule, half)]
    return Figures(
        violations=sum(case.violates for case, _ in told),
        kept=sum(not case.violates for case, _ in told),
        found=sum(said and case.violates for case, said in told),
        false_alarms=sum(said and not case.violates for case, said in told),
    )


def table() -> str:
    """Markdown: of every rule the held-out half's figures beside those of the half worked on."""
    rows = ["| rule | violations | kept | precision | recall | precision, worked on | recall, worked on |"]
    rows.append("|---" * 7 + "|")
    for rule in get_args(RuleName):
        held, worked = figures(rule, "held_out"), figures(rule, "worked_on")
        rows.append(
            f"| {rule} | {held.violations} | {held.kept} | {held.precision:.2f} | {held.recall:.2f} "
            f"| {worked.precision:.2f} | {worked.recall:.2f} |"
        )
    return "\n".join(rows)

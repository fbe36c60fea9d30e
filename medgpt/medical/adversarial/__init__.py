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

from medgpt.config.ppo_rewards import RuleName
from medgpt.medical.red_flags import question_level
from medgpt.medical.rules import RULES
from medgpt.medical.triage import questions

LEFT_ASIDE = {  # complaints of triage.toml that red_flags.toml was not fitted to
    *("breathlessness", "allergic_reaction", "abdominal_pain", "diarrhoea", "pregnancy"),
    *("child_fever", "seizure", "back_pain", "eye", "exposure", "mental_health", "wound", "burn"),
    *("diabetes", "throat", "cough"),
}
HEAD = (
    "| rule | violations | kept | precision | recall | precision, worked on | recall, worked on |"
)
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
    told = [(case, RULES[rule](case.question, case.answer)) for case in cases(rule, half)]
    return Figures(
        violations=sum(case.violates for case, _ in told),
        kept=sum(not case.violates for case, _ in told),
        found=sum(said and case.violates for case, said in told),
        false_alarms=sum(said and not case.violates for case, said in told),
    )


def red_flag_figures() -> Figures:
    """Of the emergency level alone, on notes of complaints that no pattern was made for."""
    told = [
        (question_level(question.text) == "emergency", question.level == "emergency")
        for question in questions(0)
        if question.complaint in LEFT_ASIDE
    ]
    return Figures(
        violations=sum(red for _, red in told),
        kept=sum(not red for _, red in told),
        found=sum(said and red for said, red in told),
        false_alarms=sum(said and not red for said, red in told),
    )


def table() -> str:
    """Markdown: of every rule the held-out half's figures beside those of the half worked on."""
    rows = [HEAD, "|---" * 7 + "|"]
    for rule in get_args(RuleName):
        held, worked = figures(rule, "held_out"), figures(rule, "worked_on")
        rows.append(f"| {rule} {_row(held)} | {worked.precision:.2f} | {worked.recall:.2f} |")
    rows.append(f"| red flags of other complaints {_row(red_flag_figures())} | | |")
    return "\n".join(rows)


def _row(found: Figures) -> str:
    return f"| {found.violations} | {found.kept} | {found.precision:.2f} | {found.recall:.2f}"

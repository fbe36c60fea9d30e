"""Parse the gates of an evaluation: `mcq.accuracy >= parent`, `nll.general <= 1.05 * parent`."""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Sign = Literal[">=", "<=", ">", "<", "=="]
OPERATORS: dict[Sign, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
}
Side = Literal["value", "low", "high"]
REWARD_TASK = "reward"
"""Task name of a reward model in gates."""
NUMBER_PATTERN = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
QUOTED_PATTERN = r"\"[^\"]+\"|'[^']+'"
TASK_PATTERN = rf"(?:{QUOTED_PATTERN}|[\w-]+)"
PART_PATTERN = rf"(?:{QUOTED_PATTERN}|[^\s\"'.<>=](?:[^\".<>=]*[^\s\".<>=])?)"
GATE_PATTERN = re.compile(
    rf"(?:(?P<side>low|high)\(\s*)?(?P<name>{TASK_PATTERN}(?:\.{PART_PATTERN}){{1,2}})(?(side)\s*\))"
    r"\s*(?P<sign>>=|<=|==|>|<)\s*"
    rf"(?:(?P<passed>pass)|(?P<number>{NUMBER_PATTERN})"
    rf"|(?:(?P<factor>{NUMBER_PATTERN})\s*\*\s*)?(?P<parent>parent)(?:\s*(?P<plus>[+-])\s*(?P<offset>{NUMBER_PATTERN}))?)"
)
GATE_SYNTAX = (
    "write TASK.METRIC, TASK.SLICE or TASK.SLICE.METRIC (a part with a dot, =, < or > in quotes), "
    "or low(...) or high(...) of it for an end of its 95 % interval, then >=, <=, >, < or ==, "
    "then a number, pass, parent, 1.05 * parent or parent - 0.02"
)


@dataclass(frozen=True, slots=True)
class Gate:
    """A condition `side(name) sign factor * parent + offset`; without a parent the factor is 0."""

    text: str
    side: Side  # of the score that must pass; the parent always counts by its value
    name: tuple[str, ...]  # task, then metric, slice value, or both
    sign: Sign
    factor: float
    offset: float

    @property
    def task(self) -> str:
        return self.name[0]

    @property
    def needs_parent(self) -> bool:
        return self.factor != 0

    def is_passed(self, value: float, parent: float) -> bool:
        """Whether `value` passes; `parent` is ignored unless the gate needs it."""
        return OPERATORS[self.sign](value, self.bound(parent))

    def bound(self, parent: float) -> float:
        """Return the number that the score is compared with."""
        return self.factor * parent + self.offset if self.needs_parent else self.offset


def parse_gate(text: str) -> Gate:
    """Parse the text of a gate. Raises ValueError if it is not one."""
    match = GATE_PATTERN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"gate {text!r} cannot be parsed; {GATE_SYNTAX}")
    sign: Sign = match["sign"]  # type: ignore[assignment]: the pattern allows no other
    factor, offset = 0.0, 0.0
    if match["passed"]:
        if sign != "==":
            raise ValueError(f"gate {text!r}: pass needs ==")
        offset = 1.0
    elif match["number"]:
        offset = float(match["number"])
    else:
        factor = float(match["factor"] or 1)
        if factor <= 0:
            raise ValueError(f"gate {text!r}: parent must be multiplied by more than 0")
        offset = float(f"{match['plus']}1") * float(match["offset"]) if match["offset"] else 0.0
    name = tuple(part.strip("\"'") for part in re.findall(PART_PATTERN, match["name"]))
    side: Side = match["side"] or "value"  # type: ignore[assignment]: as above
    return Gate(text.strip(), side, name, sign, factor, offset)

"""What an evaluation must reach: `mcq.accuracy >= parent`, `nll.general <= 1.05 * parent`."""

import re
from dataclasses import dataclass
from typing import Literal

Sign = Literal[">=", "<=", ">", "<", "=="]
Side = Literal["value", "low", "high"]
REWARD = "reward"
"""The task by which gates know a reward model."""
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
QUOTED = r"\"[^\"]+\"|'[^']+'"
TASK = rf"(?:{QUOTED}|[\w-]+)"
PART = rf"(?:{QUOTED}|[^\s\"'.<>=](?:[^\".<>=]*[^\s\".<>=])?)"
GATE = re.compile(
    rf"(?:(?P<side>low|high)\(\s*)?(?P<name>{TASK}(?:\.{PART}){{1,2}})(?(side)\s*\))"
    r"\s*(?P<sign>>=|<=|==|>|<)\s*"
    rf"(?:(?P<passed>pass)|(?P<number>{NUMBER})"
    rf"|(?:(?P<factor>{NUMBER})\s*\*\s*)?(?P<parent>parent)(?:\s*(?P<plus>[+-])\s*(?P<offset>{NUMBER}))?)"
)
SHAPE = (
    "write TASK.METRIC, TASK.SLICE or TASK.SLICE.METRIC (a part with a dot, =, < or > in quotes), "
    "or low(...) or high(...) of that for an end of its 95 % interval, then >=, <=, >, < or ==, "
    "then a number, pass, parent, 1.05 * parent or parent - 0.02"
)


@dataclass(frozen=True, slots=True)
class Gate:
    """`side` of `name` `sign` `factor` * parent + `offset`; without a parent the factor is 0."""

    text: str
    side: Side  # of the score that must pass; of the parent's the value counts
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

    def holds(self, value: float, parent: float) -> bool:
        """Whether a value passes; `parent` is not looked at if the gate needs none."""
        bound = self.bound(parent)
        match self.sign:
            case ">=":
                return value >= bound
            case "<=":
                return value <= bound
            case ">":
                return value > bound
            case "<":
                return value < bound
            case "==":
                return value == bound

    def bound(self, parent: float) -> float:
        return self.factor * parent + self.offset if self.needs_parent else self.offset


def parse_gate(text: str) -> Gate:
    """Raises ValueError: the text is no gate."""
    found = GATE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"gate {text!r} is not understood; {SHAPE}")
    sign: Sign = found["sign"]  # type: ignore[assignment]: the pattern allows no other
    factor, offset = 0.0, 0.0
    if found["passed"]:
        if sign != "==":
            raise ValueError(f"gate {text!r}: only == goes with pass")
        offset = 1.0
    elif found["number"]:
        offset = float(found["number"])
    else:
        factor = float(found["factor"] or 1)
        if factor <= 0:
            raise ValueError(f"gate {text!r}: parent must be multiplied by more than 0")
        offset = float(f"{found['plus']}1") * float(found["offset"]) if found["offset"] else 0.0
    name = tuple(part.strip("\"'") for part in re.findall(PART, found["name"]))
    side: Side = found["side"] or "value"  # type: ignore[assignment]: as above
    return Gate(text.strip(), side, name, sign, factor, offset)

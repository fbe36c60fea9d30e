"""What a trial is worth: the judge's mark, as long as the policy stays near the reference."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

from medgpt.config.tune import TuneConfig

MARKS = {"checks": "judge/checks", "score": "judge/score"}
KL = "actor/kl_ref"
BEYOND = -1e6  # below every mark
WORST = 2 * BEYOND  # of a trial that has no policy

T = TypeVar("T")


class Point(NamedTuple):
    """A judgement."""

    iteration: int
    mark: float
    error: float  # standard error of the mark
    kl: float  # nats an answer, mean since the judgement before


def points(metrics: Iterable[Mapping[str, Any]], config: TuneConfig) -> list[Point]:
    """All judgements among a run's metrics. What was judged before training has a KL of 0."""
    name, found, kls = MARKS[config.mark], list[Point](), list[float]()
    for line in metrics:
        if KL in line:
            kls.append(line[KL])
        if name in line:
            kl = fmean(kls) if kls else 0.0
            found.append(Point(line["step"], line[name], line[f"{name}_se"], kl))
            kls.clear()
    return found


def objective(point: Point, config: TuneConfig) -> float:
    """What the search maximises. Beyond the limit a trial is worse than any within; only the order
    counts for searchers and schedulers, so the step may be of any height."""
    return point.mark if point.kl <= config.max_kl else BEYOND - point.kl


def pareto(items: Sequence[T], places: Sequence[Point]) -> list[T]:
    """Those for which no other has a mark as high at a KL as low, and one of them better; by KL."""
    best: list[T] = []
    highest = -float("inf")
    for item, place in sorted(
        zip(items, places, strict=True), key=lambda pair: (pair[1].kl, -pair[1].mark)
    ):
        if place.mark > highest:
            highest = place.mark
            best.append(item)
    return best

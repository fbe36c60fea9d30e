"""What a trial is worth: the judge's mark, as long as the policy stays near the reference."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

from medgpt.config.tune import TuneConfig

JUDGE_METRICS = {"checks": "judge/checks", "score": "judge/score"}
KL_METRIC = "actor/kl_ref"
OVER_KL_LIMIT = -1e6  # below every mark
WORST_OBJECTIVE = 2 * OVER_KL_LIMIT  # of a trial that has no policy

T = TypeVar("T")


class JudgeResult(NamedTuple):
    """A judgement."""

    iteration: int
    metric: float
    metric_se: float  # standard error of the mark
    kl: float  # nats an answer, mean since the judgement before


def judge_results(metrics: Iterable[Mapping[str, Any]], config: TuneConfig) -> list[JudgeResult]:
    """All judgements among a run's metrics. What was judged before training has a KL of 0."""
    name, results, kls = JUDGE_METRICS[config.mark], list[JudgeResult](), list[float]()
    for line in metrics:
        if KL_METRIC in line:
            kls.append(line[KL_METRIC])
        if name in line:
            kl = fmean(kls) if kls else 0.0
            results.append(JudgeResult(line["step"], line[name], line[f"{name}_se"], kl))
            kls.clear()
    return results


def objective(result: JudgeResult, config: TuneConfig) -> float:
    """What the search maximises. Beyond the limit a trial is worse than any within; only the order
    counts for searchers and schedulers, so the step may be of any height."""
    return result.metric if result.kl <= config.max_kl else OVER_KL_LIMIT - result.kl


def pareto_optimal(items: Sequence[T], results: Sequence[JudgeResult]) -> list[T]:
    """Those for which no other has a mark as high at a KL as low, and one of them better; by KL."""
    optimal: list[T] = []
    highest = -float("inf")
    for item, result in sorted(
        zip(items, results, strict=True), key=lambda pair: (pair[1].kl, -pair[1].metric)
    ):
        if result.metric > highest:
            highest = result.metric
            optimal.append(item)
    return optimal

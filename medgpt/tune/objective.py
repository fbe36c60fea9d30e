"""The objective of a search: the judge metric, as long as the policy stays near the reference."""

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any, NamedTuple

from medgpt.config.tune import TuneConfig

JUDGE_METRICS = {"checks": "judge/checks", "score": "judge/score"}
KL_METRIC = "actor/kl_ref"
OVER_KL_LIMIT = -1e6  # below every metric
WORST_OBJECTIVE = 2 * OVER_KL_LIMIT  # of a trial without a policy


class JudgeResult(NamedTuple):
    """The result of one judge evaluation."""

    iteration: int
    metric: float
    metric_se: float  # standard error
    kl: float  # nats per answer, mean since the judge evaluation before


def judge_results(metrics: Iterable[Mapping[str, Any]], config: TuneConfig) -> list[JudgeResult]:
    """Return all judge results among the metrics of a run. Before training the KL is 0."""
    name, results, kls = JUDGE_METRICS[config.metric], list[JudgeResult](), list[float]()
    for line in metrics:
        if KL_METRIC in line:
            kls.append(line[KL_METRIC])
        if name in line:
            kl = fmean(kls) if kls else 0.0
            results.append(JudgeResult(line["step"], line[name], line[f"{name}_se"], kl))
            kls.clear()
    return results


def objective(result: JudgeResult, config: TuneConfig) -> float:
    """Return the number that the search maximizes. Every result above max_kl is below all others;
    only the order counts for searchers and schedulers, so the size of the step is arbitrary."""
    return result.metric if result.kl <= config.max_kl else OVER_KL_LIMIT - result.kl

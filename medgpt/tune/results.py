"""The results of a search: the table of its trials, the winner, and a config that repeats it."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w

from medgpt.config.loading import with_values
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.tune import TuneStageConfig
from medgpt.runs import Run
from medgpt.tune.objective import JudgeResult, judge_results, objective
from medgpt.tune.trial_records import TrialRecord, TrialRecords

TABLE_FILE, BEST_CONFIG_FILE = "results.parquet", "best.toml"


def trials_url(config: TuneStageConfig) -> str:
    return f"{config.run.dir}/trials"


@dataclass(frozen=True)
class TrialResult:
    """A trial with all of its judge results."""

    record: TrialRecord
    judge_results: Sequence[JudgeResult]
    time_s: float

    @property
    def last_result(self) -> JudgeResult | None:
        """The last judge result, or None if it comes from before training."""
        last = self.judge_results[-1] if self.judge_results else None
        return last if last is not None and last.iteration else None


def load_results(config: TuneStageConfig) -> list[TrialResult]:
    """Return the results of all trials, by name."""
    records = TrialRecords(trials_url(config))
    results = []
    for record in records.all():
        metrics = records.run(record.name).metrics()
        time_s = metrics[-1]["time_s"] if metrics else 0.0
        results.append(TrialResult(record, judge_results(metrics, config.tune), time_s))
    return results


def winner(results: Sequence[TrialResult], config: TuneStageConfig) -> TrialResult | None:
    """Return the finished trial with the highest metric within max_kl, of equals the nearest."""
    candidates = [
        (last.metric, -last.kl, result)
        for result in results
        if (last := result.last_result) is not None
        if result.record.status == "finished" and last.kl <= config.tune.max_kl
    ]
    return max(candidates, key=lambda candidate: candidate[:2])[2] if candidates else None


def pareto_front(results: Sequence[TrialResult]) -> list[TrialResult]:
    """Return the trials, by KL, for which no other has at least the metric at no more KL."""
    trained = [(last.kl, -last.metric, r) for r in results if (last := r.last_result) is not None]
    front, highest = list[TrialResult](), -math.inf
    for _, negative_metric, result in sorted(trained, key=lambda item: item[:2]):
        if -negative_metric > highest:
            highest = -negative_metric
            front.append(result)
    return front


def write_table(run: Run, results: Sequence[TrialResult], config: TuneStageConfig) -> None:
    """Write results.parquet: a row for each trial."""
    best, optimal = winner(results, config), pareto_front(results)
    columns: dict[str, list[Any]] = {}
    for result in results:
        last = result.last_result
        row = {
            "trial": result.record.name,
            "status": result.record.status,
            "why": result.record.why,
            "iteration": last and last.iteration,
            "mark": last and last.metric,
            "mark_se": last and last.metric_se,
            "kl": last and last.kl,
            "objective": last and objective(last, config.tune),
            "time_s": result.time_s,
            "pareto": result in optimal,
            "winner": result is best,
            "copied": json.dumps([[c.trial, c.iteration] for c in result.record.copied]),
            **result.record.params,
        }
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    with run.folder.staging() as directory:
        pq.write_table(pa.table(columns), directory / TABLE_FILE)


def write_best(run: Run, best: TrialResult, config: TuneStageConfig) -> None:
    """Write best.toml, a config for `medgpt ppo`."""
    last = best.last_result
    assert last is not None
    head = [
        f"# Trial {best.record.name} of {run.folder.url}: {config.tune.metric} {last.metric:.3f} ± "
        f"{last.metric_se:.3f}, {last.kl:.2f} nats from the reference."
    ]
    if best.record.copied:
        head.append("# PBT changed its values while it trained; these are the last ones.")
    values = {**best.record.params, "run.dir": f"{run.folder.url}/best"}
    best_config = with_values(PPOStageConfig, config.base_config, values)
    tree = best_config.model_dump(mode="json", exclude_defaults=True)
    run.folder.write_text(BEST_CONFIG_FILE, "\n".join([*head, "", tomli_w.dumps(tree)]))


@dataclass(frozen=True)
class TrainedPolicy:
    """A trained model. Without a seed of its own, it is sampled from with several seeds."""

    name: str
    seed: int | None
    url: str

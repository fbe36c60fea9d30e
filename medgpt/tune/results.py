"""What a search found: a table of its trials, the best of them, and a config that repeats it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w

from medgpt.config.loading import with_values
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.tune import Params, TuneStageConfig
from medgpt.runs import Run
from medgpt.tune.objective import Point, objective, pareto, points
from medgpt.tune.trial_records import Record, Records

TABLE, BEST = "results.parquet", "best.toml"


def trials_url(config: TuneStageConfig) -> str:
    return f"{config.run.dir}/trials"


@dataclass(frozen=True)
class Outcome:
    """A trial with all of its judgements."""

    record: Record
    points: Sequence[Point]
    time_s: float

    @property
    def last(self) -> Point | None:
        """The last judgement after some training."""
        return self.points[-1] if self.points and self.points[-1].iteration else None


def outcomes(config: TuneStageConfig) -> list[Outcome]:
    """Of all trials, by number."""
    records = Records(trials_url(config))
    found = []
    for record in records.all():
        metrics = records.run(record.name).metrics()
        time_s = metrics[-1]["time_s"] if metrics else 0.0
        found.append(Outcome(record, points(metrics, config.tune), time_s))
    return found


def winner(found: Sequence[Outcome], config: TuneStageConfig) -> Outcome | None:
    """The best that was trained to the end, if there is one within the limit of divergence; of
    several, the nearest to the reference."""
    whole = [
        (outcome, outcome.last)
        for outcome in found
        if outcome.record.status == "finished" and outcome.last is not None
    ]
    within = [(o, last) for o, last in whole if last.kl <= config.tune.max_kl]
    best = max(within, key=lambda pair: (pair[1].mark, -pair[1].kl), default=None)
    return None if best is None else best[0]


def front(found: Sequence[Outcome]) -> list[Outcome]:
    """Trials with the highest marks at their divergence, by divergence."""
    judged = [(outcome, outcome.last) for outcome in found if outcome.last is not None]
    return pareto([outcome for outcome, _ in judged], [last for _, last in judged])


def write_table(run: Run, found: Sequence[Outcome], config: TuneStageConfig) -> None:
    """results.parquet: a row for each trial."""
    best, efficient = winner(found, config), front(found)
    columns: dict[str, list[Any]] = {}
    for outcome in found:
        last = outcome.last
        row = {
            "trial": outcome.record.name,
            "status": outcome.record.status,
            "why": outcome.record.why,
            "iteration": last and last.iteration,
            "mark": last and last.mark,
            "mark_se": last and last.error,
            "kl": last and last.kl,
            "objective": last and objective(last, config.tune),
            "time_s": outcome.time_s,
            "pareto": outcome in efficient,
            "winner": outcome is best,
            "copied": json.dumps([[c.trial, c.iteration] for c in outcome.record.copied]),
            **outcome.record.params,
        }
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    with run.folder.staging() as directory:
        pq.write_table(pa.table(columns), directory / TABLE)


def write_best(run: Run, best: Outcome, config: TuneStageConfig) -> None:
    """best.toml, which `medgpt ppo` takes."""
    last = best.last
    assert last is not None
    head = [
        f"# Trial {best.record.name} of {run.folder.url}: {config.tune.mark} {last.mark:.3f} ± "
        f"{last.error:.3f}, {last.kl:.2f} nats from the reference."
    ]
    if best.record.copied:
        head.append("# Its values changed on the way; these are the last ones.")
    values = repeated(config, best.record.params, f"{run.folder.url}/best")
    tree = values.model_dump(mode="json", exclude_defaults=True)
    run.folder.write_text(BEST, "\n".join([*head, "", tomli_w.dumps(tree)]))


def repeated(config: TuneStageConfig, params: Params, url: str) -> PPOStageConfig:
    """The base with a trial's values, as a run of its own."""
    return with_values(PPOStageConfig, config.stage, {**params, "run.dir": url})


@dataclass(frozen=True)
class Policy:
    """A trained model. Without a seed of its own it is sampled from with several."""

    who: str
    seed: int | None
    url: str

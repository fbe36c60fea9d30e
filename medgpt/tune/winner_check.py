"""The winner against the base's own values, by questions that no trial was judged by.

The winner was chosen because its mark was high, by some luck; what it is worth is told by others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev

from medgpt.config.tune import Params, TuneStageConfig
from medgpt.metrics import ConsoleReporter
from medgpt.runs import Run
from medgpt.tune.results import Outcome, Policy
from medgpt.tune.search import run_listed
from medgpt.tune.trial import Setup
from medgpt.tune.trial_records import Records

FILE = "check.json"
BASE, WINNER = "base", "winner"


def check_winner(
    run: Run,
    config: TuneStageConfig,
    setup: Setup,
    best: Outcome,
    *,
    concurrent: int,
    reporter: ConsoleReporter,
) -> None:
    """Write check.json: for each policy and seed its mark by the check's questions, and its KL."""
    if not config.check.seeds or run.folder.exists(FILE):
        return
    rivals = {BASE: config.own_values, WINNER: best.record.params}
    if rivals[BASE] == rivals[WINNER]:
        del rivals[BASE]
    records = Records(f"{run.folder.url}/check")
    trials = _trainings(config, setup, rivals)
    if trials:
        reporter.say(f"check: training {', '.join(trials)}")
        there = replace(setup, trials_url=records.folder.url)
        run_listed(trials, there, concurrent=concurrent, say=reporter.say)
    from medgpt.tune.final_eval import examine  # needs torch

    rows = examine(config, setup, _policies(config, setup, rivals, best, records))
    run.folder.write_json(FILE, rows)
    for who in rivals:
        marks = [row["mark"] for row in rows if row["policy"] == who]
        if marks:
            told = f"{fmean(marks):.3f} ± {standard_error(marks):.3f}"
            reporter.say(f"check: {who} {told} by {len(marks)} seeds on fresh questions")


def standard_error(values: Sequence[float]) -> float:
    """Of the mean."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _trainings(
    config: TuneStageConfig, setup: Setup, rivals: Mapping[str, Params]
) -> dict[str, Params]:
    """Values of what must be trained, by name."""
    if config.check.retrain:
        return {
            f"{who}-{seed}": {**params, "run.seed": setup.stage.run.seed + seed}
            for who, params in rivals.items()
            for seed in range(1, config.check.seeds + 1)
        }
    missing = BASE in rivals and _trained(setup, rivals[BASE]) is None
    return {BASE: rivals[BASE]} if missing else {}


def _trained(setup: Setup, params: Params) -> str | None:
    """The model of a trial that had these values to its end."""
    records = Records(setup.trials_url)
    for record in records.all():
        if record.status == "finished" and record.params == params and not record.copied:
            return records.run(record.name).model.url
    return None


def _policies(
    config: TuneStageConfig,
    setup: Setup,
    rivals: Mapping[str, Params],
    best: Outcome,
    records: Records,
) -> list[Policy]:
    """All that were trained to their end."""
    if config.check.retrain:
        named = {(who, s): f"{who}-{s}" for who in rivals for s in range(1, config.check.seeds + 1)}
        return [
            Policy(who, seed, records.run(name).model.url)
            for (who, seed), name in named.items()
            if (record := records.read(name)) and record.status == "finished"
        ]
    found = {WINNER: Records(setup.trials_url).run(best.record.name).model.url}
    if BASE in rivals:
        own, record = _trained(setup, rivals[BASE]), records.read(BASE)
        if own is None and record is not None and record.status == "finished":
            own = records.run(BASE).model.url
        found |= {BASE: own} if own is not None else {}
    return [Policy(who, None, url) for who, url in found.items()]

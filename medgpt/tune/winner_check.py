"""Compare the winner with the base config on questions that no trial was judged by.

The winner was chosen by its metric, and so partly by luck; the reserved questions correct for that.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev

from medgpt.config.tune import Params, TuneStageConfig
from medgpt.metrics import ConsoleReporter
from medgpt.runs import Run
from medgpt.tune.results import TrainedPolicy, TrialResult
from medgpt.tune.search import run_named_trials
from medgpt.tune.trial import TrialSetup
from medgpt.tune.trial_records import TrialRecords

CHECK_FILE = "check.json"
BASE, WINNER = "base", "winner"


def check_winner(
    run: Run,
    config: TuneStageConfig,
    setup: TrialSetup,
    best: TrialResult,
    *,
    max_concurrent: int,
    reporter: ConsoleReporter,
) -> None:
    """Write check.json: metric and KL of each policy and seed on the reserved questions."""
    if not config.check.seeds or run.folder.exists(CHECK_FILE):
        return
    params_by_policy = {BASE: config.base_values, WINNER: best.record.params}
    if params_by_policy[BASE] == params_by_policy[WINNER]:
        del params_by_policy[BASE]
    records = TrialRecords(f"{run.folder.url}/check")
    trials = _trials_to_train(config, setup, params_by_policy)
    if trials:
        reporter.say(f"check: training {', '.join(trials)}")
        check_setup = replace(setup, trials_url=records.folder.url)
        run_named_trials(trials, check_setup, max_concurrent=max_concurrent, say=reporter.say)
    from medgpt.tune.final_eval import evaluate_policies  # needs torch

    policies = _trained_policies(config, setup, params_by_policy, best, records)
    rows = evaluate_policies(config, setup, policies)
    run.folder.write_json(CHECK_FILE, rows)
    for name in params_by_policy:
        metrics = [row["mark"] for row in rows if row["policy"] == name]
        if metrics:
            summary = f"{fmean(metrics):.3f} ± {standard_error(metrics):.3f}"
            reporter.say(f"check: {name} {summary} by {len(metrics)} seeds on fresh questions")


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _trials_to_train(
    config: TuneStageConfig, setup: TrialSetup, params_by_policy: Mapping[str, Params]
) -> dict[str, Params]:
    """Return the values of the models that must be trained, by trial name."""
    if config.check.retrain:
        return {
            f"{name}-{seed}": {**params, "run.seed": setup.ppo_config.run.seed + seed}
            for name, params in params_by_policy.items()
            for seed in range(1, config.check.seeds + 1)
        }
    base = params_by_policy.get(BASE)
    return {} if base is None or _find_model(setup, base) is not None else {BASE: base}


def _trained_policies(
    config: TuneStageConfig,
    setup: TrialSetup,
    params_by_policy: Mapping[str, Params],
    best: TrialResult,
    records: TrialRecords,
) -> list[TrainedPolicy]:
    """Return all models that were trained to the end."""
    if config.check.retrain:
        return [
            TrainedPolicy(name, seed, url)
            for name in params_by_policy
            for seed in range(1, config.check.seeds + 1)
            if (url := _model_url(records, f"{name}-{seed}")) is not None
        ]
    urls = {WINNER: _model_url(TrialRecords(setup.trials_url), best.record.name)}
    if BASE in params_by_policy:
        urls[BASE] = _find_model(setup, params_by_policy[BASE]) or _model_url(records, BASE)
    return [TrainedPolicy(name, None, url) for name, url in urls.items() if url is not None]


def _find_model(setup: TrialSetup, params: Params) -> str | None:
    """Return the URL of the model of a finished trial that had these values throughout."""
    records = TrialRecords(setup.trials_url)
    names = [r.name for r in records.all() if r.params == params and not r.copied]
    return next((url for name in names if (url := _model_url(records, name))), None)


def _model_url(records: TrialRecords, name: str) -> str | None:
    """Return the URL of the model of a trial, None unless the trial is finished."""
    record = records.read(name)
    finished = record is not None and record.status == "finished"
    return records.run(name).model.url if finished else None

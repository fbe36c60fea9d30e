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
    """Write check.json: the metric and the KL of each policy and seed, on the reserved
    questions."""
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

    rows = evaluate_policies(
        config, setup, _trained_policies(config, setup, params_by_policy, best, records)
    )
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
            f"{policy_name}-{seed}": {**params, "run.seed": setup.ppo_config.run.seed + seed}
            for policy_name, params in params_by_policy.items()
            for seed in range(1, config.check.seeds + 1)
        }
    train_base = (
        BASE in params_by_policy and _find_trained_model(setup, params_by_policy[BASE]) is None
    )
    return {BASE: params_by_policy[BASE]} if train_base else {}


def _find_trained_model(setup: TrialSetup, params: Params) -> str | None:
    """Return the URL of the model of a finished trial that had these values throughout."""
    records = TrialRecords(setup.trials_url)
    for record in records.all():
        if record.status == "finished" and record.params == params and not record.copied:
            return records.run(record.name).model.url
    return None


def _trained_policies(
    config: TuneStageConfig,
    setup: TrialSetup,
    params_by_policy: Mapping[str, Params],
    best: TrialResult,
    records: TrialRecords,
) -> list[TrainedPolicy]:
    """Return all models that were trained to the end."""
    if config.check.retrain:
        trial_names = {
            (policy_name, seed): f"{policy_name}-{seed}"
            for policy_name in params_by_policy
            for seed in range(1, config.check.seeds + 1)
        }
        return [
            TrainedPolicy(policy_name, seed, records.run(name).model.url)
            for (policy_name, seed), name in trial_names.items()
            if (record := records.read(name)) and record.status == "finished"
        ]
    model_urls = {WINNER: TrialRecords(setup.trials_url).run(best.record.name).model.url}
    if BASE in params_by_policy:
        base_url, record = _find_trained_model(setup, params_by_policy[BASE]), records.read(BASE)
        if base_url is None and record is not None and record.status == "finished":
            base_url = records.run(BASE).model.url
        model_urls |= {BASE: base_url} if base_url is not None else {}
    return [TrainedPolicy(policy_name, None, url) for policy_name, url in model_urls.items()]

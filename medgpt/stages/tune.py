"""`medgpt tune`: run trials, write their table and the best config, check it, report."""

from functools import partial

import ray

from medgpt.cluster import ray_init
from medgpt.config.tune import TuneStageConfig
from medgpt.metrics import ConsoleReporter
from medgpt.rlhf.rewards.weighted_sum import WeightedRewards
from medgpt.runs import Run
from medgpt.stages.opening import open_stage, report
from medgpt.tune.results import load_results, trials_url, winner, write_best, write_table
from medgpt.tune.search import run_search
from medgpt.tune.setup import (
    config_for_trials,
    largest_config,
    num_concurrent_trials,
    prepare_base,
)
from medgpt.tune.shared_pools import start_shared_pools, stop_shared_pools
from medgpt.tune.trial import TrialSetup
from medgpt.tune.winner_check import check_winner


def run_tune(config: TuneStageConfig) -> Run:
    """Run a hyperparameter search and write the report."""
    with open_stage("tune", config, "search") as (run, reporter):
        if not run.finished:
            base = Run.open(
                "ppo",
                config.base_config,
                run_dir=config.base_config.run.dir,
                allow_changes=config.run.allow_changes,
            )
            WeightedRewards(config.base_config.reward)  # fails first if a function is missing
            ray_init.init_ray(config.base_config.cluster)
            max_concurrent = num_concurrent_trials(config)
            prepare_base(base, config, reporter)
            _run_trials(run, config, max_concurrent, reporter)
            run.update_manifest(finished=True)
    return report("tune", run, partial(_write_report, config))


def _run_trials(
    run: Run, config: TuneStageConfig, max_concurrent: int, reporter: ConsoleReporter
) -> None:
    """Run the trials, write their table and the best config, and check the winner."""
    ppo_config = config_for_trials(config)
    shared_pools = None
    if config.tune.shared_pools:
        largest = largest_config(config, ppo_config)
        shared_pools = start_shared_pools(largest, num_callers=max_concurrent)
    try:
        setup = TrialSetup(
            ppo_config=ppo_config,
            config=config.tune,
            trials_url=trials_url(config),
            base_url=config.base_config.run.dir,
            shared_pools=shared_pools,
        )
        reporter.say(f"{max_concurrent} trials at a time")
        run_search(config, setup, max_concurrent=max_concurrent, say=reporter.say)
        results = load_results(config)
        write_table(run, results, config)
        best = winner(results, config)
        if best is None:
            reporter.say("no trial finished within tune.max_kl; see the report")
        else:
            write_best(run, best, config)
            check_winner(run, config, setup, best, max_concurrent=max_concurrent, reporter=reporter)
        if shared_pools is not None:
            run.update_manifest(shared_pools=ray.get(shared_pools.owner.counts.remote()))
    finally:
        if shared_pools is not None:
            stop_shared_pools(shared_pools.owner)


def _write_report(config: TuneStageConfig, run: Run) -> None:
    from medgpt.reports.tuning import write_tune_report  # imports matplotlib

    write_tune_report(run, config)

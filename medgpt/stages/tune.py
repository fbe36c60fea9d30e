"""`medgpt tune`: trials, their table, the best config, its check, and the report."""

import ray

from medgpt.cluster import ray_init
from medgpt.config.tune import TuneStageConfig
from medgpt.metrics import ConsoleReporter
from medgpt.rlhf.rewards.total import Rewards
from medgpt.runs import Run
from medgpt.tune.results import outcomes, trials_url, winner, write_best, write_table
from medgpt.tune.search import run_search
from medgpt.tune.setup import base_run, count_trials, for_trials, prepare_base, widest
from medgpt.tune.shared_pools import start_front, stop_front
from medgpt.tune.trial import Setup
from medgpt.tune.winner_check import check_winner


def run_tune(config: TuneStageConfig) -> Run:
    from medgpt.reports.tuning import write_tune_report

    run = run_tune_stage(config)
    if not run.folder.exists("report.html"):
        write_tune_report(run, config)
    print(f"tune: report in {run.folder.url}/report.html")
    return run


def run_tune_stage(config: TuneStageConfig) -> Run:
    """Run or resume a search; a finished one is returned as it is.

    Raises:
        ConfigError: whatever the user can repair, in words.
    """
    run = Run.open("tune", config, run_dir=config.run.dir, allow_changes=config.run.allow_changes)
    reporter = ConsoleReporter("tune")
    try:
        if run.finished:
            reporter.say(f"{run.folder.url} is finished; choose another run.dir to search again")
            return run
        reporter.say(f"run directory {run.folder.url}")
        base = base_run(config)
        Rewards(config.stage.reward)  # a function that cannot be imported is told before all else
        ray_init.connect(config.stage.cluster)
        concurrent = count_trials(config)
        prepare_base(base, config, reporter)
        _search(run, config, concurrent, reporter)
        run.update_manifest(finished=True)
    finally:
        reporter.close()
    return run


def _search(run: Run, config: TuneStageConfig, concurrent: int, reporter: ConsoleReporter) -> None:
    """Trials, their table, the best config, and its check."""
    stage = for_trials(config)
    front, num_workers = None, dict[str, int]()
    if config.tune.shared_pools:
        front, num_workers = start_front(widest(config, stage), num_callers=concurrent)
    try:
        setup = Setup(
            stage=stage,
            config=config.tune,
            trials_url=trials_url(config),
            base_url=config.stage.run.dir,
            front=front,
            num_workers=num_workers,
        )
        reporter.say(f"{concurrent} trials at a time")
        run_search(config, setup, concurrent=concurrent, say=reporter.say)
        found = outcomes(config)
        write_table(run, found, config)
        best = winner(found, config)
        if best is None:
            reporter.say("no trial came to its end within tune.max_kl; see the report")
        else:
            write_best(run, best, config)
            check_winner(run, config, setup, best, concurrent=concurrent, reporter=reporter)
        if front is not None:
            run.update_manifest(shared_pools=ray.get(front.counts.remote()))
    finally:
        if front is not None:
            stop_front(front)

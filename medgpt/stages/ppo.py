"""`medgpt ppo`: prepare prompts, start the pools, train, export, report."""

from functools import partial

from medgpt.cluster import ray_init
from medgpt.config.base import ConfigError
from medgpt.config.ppo import PPOStageConfig
from medgpt.rlhf.heldout_questions import HeldoutQuestions
from medgpt.rlhf.rewards.weighted_sum import WeightedRewards
from medgpt.rlhf.setup import build_pools, build_ppo, export_models, prepare_prompts
from medgpt.runs import Run
from medgpt.stages.opening import open_stage, report


def run_ppo(config: PPOStageConfig) -> Run:
    """Run PPO and write the report; a diverged run raises ConfigError, too."""
    from medgpt.rlhf.diagnosis import Diverged
    from medgpt.rlhf.pools.pools import DataLost, NodesDraining, PoolDied

    try:
        run = train_ppo(config)
    except Diverged as diverged:
        run = Run(config.run.dir)
        _write_report(run)
        raise ConfigError(f"halted {diverged}; report in {run.folder.url}/report.html") from None
    except (PoolDied, DataLost, NodesDraining) as loss:
        limit = "max_preemptions" if isinstance(loss, NodesDraining) else "max_failures"
        raise ConfigError(
            f"{loss}, which exceeds cluster.{limit}={getattr(config.cluster, limit)}; run the same "
            "command again to resume from the newest checkpoint"
        ) from loss
    return report("ppo", run, _write_report)


def train_ppo(config: PPOStageConfig) -> Run:
    """Run PPO without a report."""
    with open_stage("ppo", config) as (run, reporter):
        if run.finished:
            return run
        # report errors of the config before anything is prepared or loaded
        WeightedRewards(config.reward)
        HeldoutQuestions(config.judge, config.run.seed)
        ray_init.init_ray(config.cluster)
        build_pools(config, 0, reporter).preflight()
        plan = prepare_prompts(run, config, reporter)
        pools = build_pools(config, plan.num_steps, reporter)
        try:
            pools.start()
            ppo = build_ppo(run, config, pools, reporter, plan=plan)
            ppo.fit(partial(export_models, run, config, pools))
        finally:
            pools.close()
        run.update_manifest(finished=True, timings={"training_s": run.metrics()[-1]["time_s"]})
        reporter.say(f"model in {run.model.url}")
    return run


def _write_report(run: Run) -> None:
    from medgpt.reports.ppo import write_ppo_report

    write_ppo_report(run)

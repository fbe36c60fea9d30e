"""Training stages as commands: train, then report."""

from medgpt.config import (
    ConfigError,
    DPOConfig,
    PPOStageConfig,
    PretrainConfig,
    RewardConfig,
    SFTConfig,
    TrainStageConfig,
    TuneStageConfig,
)
from medgpt.runs import Run
from medgpt.train.stage import run_stage


def run_pretrain(config: PretrainConfig) -> Run:
    return _trained("pretrain", config)


def run_sft(config: SFTConfig) -> Run:
    return _trained("sft", config)


def run_reward(config: RewardConfig) -> Run:
    return _trained("reward", config)


def run_dpo(config: DPOConfig) -> Run:
    return _trained("dpo", config)


def run_ppo(config: PPOStageConfig) -> Run:
    """Raises ConfigError: also where the run has diverged, or its workers died too often."""
    from medgpt.rlhf.diagnosis import Diverged
    from medgpt.rlhf.pools import DataLost, Leaving, PoolDied
    from medgpt.rlhf.stage import run_ppo_stage

    try:
        run = run_ppo_stage(config)
    except Diverged as diverged:
        run = Run(config.run.dir)
        _report_ppo(run)
        raise ConfigError(f"halted {diverged}; report in {run.folder.url}/report.html") from None
    except (PoolDied, DataLost, Leaving) as loss:
        limit = "max_preemptions" if isinstance(loss, Leaving) else "max_failures"
        raise ConfigError(
            f"{loss}, which was once more than cluster.{limit}={getattr(config.cluster, limit)} "
            "allows; the same command goes on from the newest checkpoint"
        ) from loss
    if not run.folder.exists("report.html"):
        _report_ppo(run)
    print(f"ppo: report in {run.folder.url}/report.html")
    return run


def run_tune(config: TuneStageConfig) -> Run:
    from medgpt.eval.tune_report import write_tune_report
    from medgpt.tune.stage import run_tune_stage

    run = run_tune_stage(config)
    if not run.folder.exists("report.html"):
        write_tune_report(run, config)
    print(f"tune: report in {run.folder.url}/report.html")
    return run


def _report_ppo(run: Run) -> None:
    from medgpt.eval.ppo_report import write_ppo_report

    write_ppo_report(run)


def _trained(stage: str, config: TrainStageConfig) -> Run:
    run = run_stage(stage, config)
    if not run.folder.exists("report.html"):
        from medgpt.eval.report import write_report  # matplotlib would delay the start of training

        write_report(run)
    print(f"{stage}: report in {run.folder.url}/report.html")
    return run

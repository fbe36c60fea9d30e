"""Training stages as commands: train, then report."""

from medgpt.config import DPOConfig, PretrainConfig, RewardConfig, SFTConfig, TrainStageConfig
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


def _trained(stage: str, config: TrainStageConfig) -> Run:
    run = run_stage(stage, config)
    if not run.folder.exists("report.html"):
        from medgpt.eval.report import write_report  # matplotlib would delay the start of training

        write_report(run)
    print(f"{stage}: report in {run.folder.url}/report.html")
    return run

"""`medgpt dpo`: train on preferences without a reward model, as a supervised stage."""

from medgpt.config.dpo import DPOConfig
from medgpt.runs import Run
from medgpt.stages.train import train_stage


def run_dpo(config: DPOConfig) -> Run:
    return train_stage("dpo", config)

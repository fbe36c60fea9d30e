"""`medgpt dpo`: train on preferences without a reward model, as a supervised stage."""

from medgpt.config.dpo import DPOConfig
from medgpt.runs import Run
from medgpt.stages.train import train_and_write_report


def run_dpo(config: DPOConfig) -> Run:
    return train_and_write_report("dpo", config)

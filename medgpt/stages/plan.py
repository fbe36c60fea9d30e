"""`medgpt plan`: print what a stage needs on a cluster, as tables or as JSON."""

import json
from pathlib import Path
from typing import Any

from medgpt.config.base import ConfigError
from medgpt.config.loading import load
from medgpt.planning.hardware import read_cluster
from medgpt.planning.plan import make_plan
from medgpt.planning.plan_output import plan_to_json, print_plan
from medgpt.stages.pipeline_stages import STAGE_CONFIGS

PLANNABLE_STAGES = ("pretrain", "sft", "reward", "dpo", "ppo")


def run_plan(
    stage: str,
    path: Path,
    overrides: list[str],
    cluster: Path,
    hardware: Path | None,
    tokens: float | None,
    mfu: float,
    as_json: bool,
) -> None:
    """Print the plan of a stage; raise ConfigError if it does not fit the cluster."""
    if stage not in PLANNABLE_STAGES:
        raise ConfigError(
            f"STAGE={stage} cannot be planned; choose one of {', '.join(PLANNABLE_STAGES)}"
        )
    config: Any = load(STAGE_CONFIGS[stage], path, overrides)
    plan = make_plan(stage, config, read_cluster(cluster, hardware), tokens=tokens, mfu=mfu)
    if as_json:
        print(json.dumps(plan_to_json(plan, mfu), indent=2))
        return
    print_plan(plan, mfu)

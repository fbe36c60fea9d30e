"""`medgpt plan`: what a stage needs on a cluster, on the console or as JSON."""

import json
from pathlib import Path
from typing import Any

from medgpt.config.base import ConfigError
from medgpt.config.loading import load
from medgpt.planning.hardware import read_cluster
from medgpt.planning.plan import make_plan
from medgpt.planning.show import show, to_json
from medgpt.stages.pipeline_stages import CONFIGS

PLANNED = ("pretrain", "sft", "reward", "dpo", "ppo")


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
    """Print the plan of a stage.

    Raises:
        ConfigError: whatever the user can repair, in words.
    """
    if stage not in PLANNED:
        raise ConfigError(f"STAGE={stage} is none that can be planned: {', '.join(PLANNED)}")
    config: Any = load(CONFIGS[stage], path, overrides)
    plan = make_plan(stage, config, read_cluster(cluster, hardware), tokens=tokens, mfu=mfu)
    if as_json:
        print(json.dumps(to_json(plan, mfu), indent=2))
        return
    show(plan, mfu)

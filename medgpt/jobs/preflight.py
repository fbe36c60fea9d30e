"""python -m medgpt.jobs.preflight STAGE CONFIG [section.key=value ...]

Checks on a cluster that it can hold a stage once it is fully scaled up.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from medgpt.cluster import ray_init
from medgpt.cluster.capacity import (
    Demands,
    NodeGroup,
    check_demands,
    cluster_nodes,
    pool_demands,
    worker_demands,
)
from medgpt.config.base import ConfigError
from medgpt.config.evaluation import EvalConfig
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.stages import TrainStageConfig
from medgpt.config.tune import TuneStageConfig
from medgpt.jobs.command import resolve_command


def resource_demands(config: Any) -> tuple[Demands, float]:
    """Return the workers that run at the same time, and the CPUs of a data task beside them."""
    match config:
        case TuneStageConfig():
            return resource_demands(config.base_config)  # one trial
        case PPOStageConfig():
            return pool_demands(config.pools.active_roles()), 0.0
        case TrainStageConfig() | EvalConfig():
            return worker_demands(config.cluster), config.cluster.data_cpus
    return {}, 0.0


def check_capacity(
    configs: Sequence[Any], present: Sequence[NodeGroup], addable: Sequence[NodeGroup]
) -> None:
    """Raise ConfigError if these nodes can never hold one of the stages."""
    for config in configs:
        demands, data_cpus = resource_demands(config)
        check_demands(demands, present, addable, data_cpus=data_cpus)


def main() -> None:
    stage, config, *overrides = sys.argv[1:]
    command = resolve_command(stage, Path(config), overrides)
    ray.init(**ray_init.SILENT_INIT)
    try:
        check_capacity(command.configs, *cluster_nodes())
    except ConfigError as error:
        print(f"medgpt: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

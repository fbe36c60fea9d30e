"""python -m medgpt.jobs.preflight STAGE CONFIG [section.key=value ...]

Whether the cluster that this runs on, grown as far as its autoscaler may, can hold a stage.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from medgpt.cluster import ray_init
from medgpt.cluster.capacity import Claims, Nodes, check, cluster_nodes, of_pools, of_workers
from medgpt.config.base import ConfigError
from medgpt.config.evaluation import EvalConfig
from medgpt.config.pools import ROLES
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.stages import TrainStageConfig
from medgpt.config.tune import TuneStageConfig
from medgpt.jobs.command import read_command


def claims(config: Any) -> tuple[Claims, float]:
    """(workers that must be there at the same time, CPUs of a data task beside them)"""
    match config:
        case TuneStageConfig():
            return claims(config.stage)  # of one trial
        case PPOStageConfig():
            absent = {"reference"} if config.pools.reference_in_actor else set()
            roles = {name: config.pools.role(name) for name in ROLES if name not in absent}
            return of_pools(roles), 0.0
        case TrainStageConfig() | EvalConfig():
            return of_workers(config.cluster), config.cluster.data_cpus
    return {}, 0.0


def check_all(configs: Sequence[Any], present: Sequence[Nodes], addable: Sequence[Nodes]) -> None:
    """Raises ConfigError: such nodes can never hold one of the stages."""
    for config in configs:
        wanted, data_cpus = claims(config)
        check(wanted, present, addable, data_cpus=data_cpus)


def main() -> None:
    stage, config, *overrides = sys.argv[1:]
    command = read_command(stage, Path(config), overrides)
    ray.init(**ray_init.SILENT)
    try:
        check_all(command.configs, *cluster_nodes())
    except ConfigError as error:
        print(f"medgpt: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

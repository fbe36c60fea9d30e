"""The plan of a stage: what it needs on a cluster, whether it fits, its time and cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medgpt.config.base import ConfigError
from medgpt.config.loading import with_values
from medgpt.config.ppo import PPOStageConfig
from medgpt.planning.hardware import PlannedCluster
from medgpt.planning.node_fit import PoolFit, describe_misfit, fit_pools, smallest_change
from medgpt.planning.node_launches import NodeLaunches, plan_node_launches
from medgpt.planning.planned_pools import PlannableConfig, PlannedPool, plan_pools, stage_demands
from medgpt.planning.time_and_cost import TimeAndCost, estimate_time_and_cost

ZERO_STAGES = (0, 1, 2, 3)
NOTHING_FITS = (
    "no change of its engine, micro-batches or workers makes it fit; use a smaller model or larger "
    "nodes"
)


@dataclass(frozen=True)
class EngineVariant:
    """Alternative engine settings of the trained pools."""

    zero_stage: int
    offload: bool
    checkpointing: bool
    fits: Mapping[str, PoolFit]
    """By pool name."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    stage: str
    cluster: PlannedCluster
    pools: Sequence[PlannedPool]
    fits: Mapping[str, PoolFit]
    """By name of the pools that have bundles of their own."""
    variants: Sequence[EngineVariant]
    launches: NodeLaunches
    time_and_cost: TimeAndCost
    notes: Sequence[str]


def make_plan(
    stage: str,
    config: PlannableConfig,
    cluster: PlannedCluster,
    *,
    tokens: float | None,
    mfu: float,
) -> StagePlan:
    """Plan a stage.

    Args:
        tokens: of the run (PPO: of prompts and responses); None: of its prepared data, if known.
        mfu: assumed share of the peak FLOP/s.

    Raises:
        ConfigError: a model cannot be found, or a pool can never be placed or fits on no node type.
    """
    pools, notes = plan_pools(config)
    launches = plan_node_launches(
        cluster, stage_demands(config), data_cpus=config.cluster.data_cpus
    )
    fits = fit_pools(pools, cluster)
    for name, fit in fits.items():
        if not any(room.fits is not False for room in fit.rooms.values()):
            change = smallest_change(config, name, cluster)
            raise ConfigError(f"{describe_misfit(name, fit)}; {change or NOTHING_FITS}")
    time_and_cost = estimate_time_and_cost(config, pools, cluster, launches, tokens=tokens, mfu=mfu)
    return StagePlan(
        stage=stage,
        cluster=cluster,
        pools=pools,
        fits=fits,
        variants=_engine_variants(config, cluster),
        launches=launches,
        time_and_cost=time_and_cost,
        notes=notes,
    )


def _engine_variants(config: PlannableConfig, cluster: PlannedCluster) -> list[EngineVariant]:
    is_ppo = isinstance(config, PPOStageConfig)
    keys = ["pools.actor.engine", "pools.critic.engine"] if is_ppo else ["engine"]
    variants = []
    for zero_stage in ZERO_STAGES:
        for offload in (False, True)[: 1 + (zero_stage > 0)]:
            for checkpointing in (False, True):
                engine = {
                    "zero_stage": zero_stage,
                    "offload_optimizer": offload,
                    "activation_checkpointing": checkpointing,
                }
                values = {f"{key}.{name}": x for key in keys for name, x in engine.items()}
                pools, _ = plan_pools(with_values(type(config), config, values))
                fits = fit_pools([pool for pool in pools if pool.is_trained], cluster)
                variants.append(EngineVariant(zero_stage, offload, checkpointing, fits))
    return variants

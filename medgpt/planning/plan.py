"""A plan: what a stage needs on a cluster, whether it fits, how long it takes and what it costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medgpt.config.base import ConfigError
from medgpt.config.ppo import PPOStageConfig
from medgpt.planning.fitting import Fit, fits_of, smallest_change, told, with_keys
from medgpt.planning.hardware import Cluster
from medgpt.planning.needs import Pool, StageConfig, claims_of, pools_of
from medgpt.planning.placing import Started, start
from medgpt.planning.timing import Timing, timing

STAGES = (0, 1, 2, 3)
NOTHING_FITS = (
    "no change of its engine, micro-batches or workers makes it fit; use a smaller model or larger "
    "nodes"
)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Another way to set up the engines of the pools that train."""

    zero_stage: int
    offload: bool
    checkpointing: bool
    fits: Mapping[str, Fit]
    """By pool."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    stage: str
    cluster: Cluster
    pools: Sequence[Pool]
    fits: Mapping[str, Fit]
    """By pool that has bundles of its own."""
    variants: Sequence[Variant]
    started: Started
    timing: Timing
    notes: Sequence[str]


def make_plan(
    stage: str, config: StageConfig, cluster: Cluster, *, tokens: float | None, mfu: float
) -> Plan:
    """The plan of a stage.

    Args:
        tokens: to train on; of PPO: of prompts and responses. None: not told how long it takes.
        mfu: share of the peak that training is assumed to reach.

    Raises:
        ConfigError: a model cannot be found, a pool can never be placed, or fits no node type.
    """
    pools, notes = pools_of(config)
    started = start(cluster, claims_of(config), data_cpus=config.cluster.data_cpus)
    fits = fits_of(pools, cluster)
    for name, fit in fits.items():
        if not any(room.fits is not False for room in fit.rooms.values()):
            change = smallest_change(config, name, cluster)
            raise ConfigError(f"{told(name, fit)}; {change or NOTHING_FITS}")
    return Plan(
        stage=stage,
        cluster=cluster,
        pools=pools,
        fits=fits,
        variants=_variants(config, cluster),
        started=started,
        timing=timing(config, pools, cluster, started, tokens=tokens, mfu=mfu),
        notes=notes,
    )


def _variants(config: StageConfig, cluster: Cluster) -> list[Variant]:
    found = []
    for zero_stage in STAGES:
        for offload in (False, True)[: 1 + (zero_stage > 0)]:
            for checkpointing in (False, True):
                keys = {
                    f"{engine}.{key}": value
                    for engine in _engines(config)
                    for key, value in {
                        "zero_stage": zero_stage,
                        "offload_optimizer": offload,
                        "activation_checkpointing": checkpointing,
                    }.items()
                }
                pools = [pool for pool in pools_of(with_keys(config, keys))[0] if pool.trains]
                found.append(
                    Variant(
                        zero_stage=zero_stage,
                        offload=offload,
                        checkpointing=checkpointing,
                        fits=fits_of(pools, cluster),
                    )
                )
    return found


def _engines(config: StageConfig) -> list[str]:
    if isinstance(config, PPOStageConfig):
        return ["pools.actor.engine", "pools.critic.engine"]
    return ["engine"]

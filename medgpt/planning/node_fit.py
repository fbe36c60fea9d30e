"""Checks whether workers fit onto nodes, and finds the smallest change that makes them fit."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medgpt.cluster.capacity import worker_bundle
from medgpt.config.base import ConfigError
from medgpt.config.loading import with_values
from medgpt.config.pools import TrainedRoleConfig
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.train import EngineConfig
from medgpt.planning.hardware import NodeType, PlannedCluster
from medgpt.planning.memory import GIB
from medgpt.planning.planned_pools import PlannableConfig, PlannedPool, plan_pools

USABLE_SHARE = 0.9
"""Share of a memory that is planned; the rest is for fragmentation and unknown allocations."""
PROCESS_BYTES = 0.6 * GIB
"""Host memory of a worker process after importing torch, transformers, DeepSpeed and Ray. Measured
without Ray: 0.4 GiB."""


@dataclass(frozen=True, kw_only=True)
class NodeFit:
    """The memory that a node type has per worker, and whether it suffices; None if unknown."""

    node: str
    device_gb: float | None
    host_gb: float | None
    fits: bool | None


@dataclass(frozen=True, kw_only=True)
class PoolFit:
    """The memory that one worker and the roles on its bundle need, and the nodes that fit."""

    device_gb: float
    host_gb: float
    rooms: Mapping[str, NodeFit]
    """By node type that has the resources and labels of the worker."""


def fit_pools(pools: Sequence[PlannedPool], cluster: PlannedCluster) -> dict[str, PoolFit]:
    """Return the fit of each pool that has bundles of its own, by name."""
    bundle_owners = [pool for pool in pools if pool.role.share_with is None]
    return {
        pool.name: _fit_bundle(
            [pool, *(p for p in pools if p.role.share_with == pool.name)], cluster
        )
        for pool in bundle_owners
    }


def _fit_bundle(bundle_pools: Sequence[PlannedPool], cluster: PlannedCluster) -> PoolFit:
    """Fit the roles on one bundle: on a GPU one role at a time is loaded, on a CPU all of them."""
    host_pool = bundle_pools[0]
    device_bytes = [pool.memory.worst_phase.total_bytes for pool in bundle_pools]
    if host_pool.on_gpu:
        device = max(device_bytes)
        host = sum(pool.memory.host_bytes + PROCESS_BYTES for pool in bundle_pools)
    else:
        device, host = sum(device_bytes) + PROCESS_BYTES * len(bundle_pools), 0.0
    rooms = {
        node.name: _fit_node(host_pool, node, device, host)
        for node in cluster.workers
        if node.to_node_group().fits(worker_bundle(host_pool.role), host_pool.role.labels)
    }
    return PoolFit(device_gb=device / GIB, host_gb=host / GIB, rooms=rooms)


def workers_per_node(node: NodeType, pool: PlannedPool) -> int:
    """Return how many workers the resources of a node hold, at least 1."""
    bundle = worker_bundle(pool.role)
    return max(1, math.floor(min(node.resources[name] / n + 1e-9 for name, n in bundle.items())))


def _fit_node(pool: PlannedPool, node: NodeType, device: float, host: float) -> NodeFit:
    host_gb = None if node.host_gb is None else node.host_gb / workers_per_node(node, pool)
    if not pool.on_gpu:
        fits = None if host_gb is None else device <= USABLE_SHARE * host_gb * GIB
        return NodeFit(node=node.name, device_gb=host_gb, host_gb=host_gb, fits=fits)
    assert node.device.memory_gb is not None, node.device_name
    gpu_gb = node.device.memory_gb * min(1.0, pool.role.gpus_per_worker)
    fits = device <= USABLE_SHARE * gpu_gb * GIB
    if fits and host_gb is not None:
        fits = host <= USABLE_SHARE * host_gb * GIB
    return NodeFit(node=node.name, device_gb=gpu_gb, host_gb=host_gb, fits=fits)


def describe_misfit(name: str, fit: PoolFit) -> str:
    """Return a sentence that says why a pool fits on no node type."""
    available = "; ".join(
        f"{room.node} has {room.device_gb:.0f} GiB"
        + (f" and {room.host_gb:.0f} GiB on the host" if room.host_gb and fit.host_gb else "")
        for room in fit.rooms.values()
        if room.device_gb is not None
    )
    host = f" and {fit.host_gb:.1f} GiB on the host" if fit.host_gb else ""
    return (
        f"a worker of {name} needs {fit.device_gb:.1f} GiB{host}, more than {USABLE_SHARE:.0%} of "
        f"the memory of every node type: {available}"
    )


# ---- the smallest change that fits ----


def smallest_change(config: PlannableConfig, name: str, cluster: PlannedCluster) -> str | None:
    """Return the fewest keys, cheapest first, with which the pool fits; None if none do."""
    for change in _candidate_changes(config, name):
        try:
            changed = with_values(type(config), config, change)
        except ConfigError:  # an invalid combination of keys
            continue
        fit = fit_pools(plan_pools(changed)[0], cluster)[name]
        if any(room.fits is not False for room in fit.rooms.values()):
            keys = " and ".join(f"{key}={_toml(value)}" for key, value in change.items())
            return f"it would fit with {keys} ({fit.device_gb:.1f} GiB)"
    return None


def _candidate_changes(config: PlannableConfig, name: str) -> Iterator[dict[str, Any]]:
    """Yield sets of keys to try: single keys before pairs, cheap keys first."""
    choices = _smaller_values(config, name)
    for size in range(1, len(choices) + 1):
        for keys in itertools.combinations(choices, size):
            for values in itertools.product(*(choices[key] for key in keys)):
                yield dict(zip(keys, values, strict=True))


def _smaller_values(config: PlannableConfig, name: str) -> dict[str, list[Any]]:
    """Return, by key, values that need less memory than the current one, cheapest keys first."""
    if isinstance(config, PPOStageConfig):
        choices = _ppo_smaller_values(config, name)
    else:
        train, workers = config.train, config.cluster.min_workers
        choices = _engine_values(
            "engine", config.engine, {"train.micro_batch_size": _halvings(train.micro_batch_size)}
        ) | {"cluster.num_workers": _doublings(workers, train.global_batch_size)}
    return {key: values for key, values in choices.items() if values}


def _ppo_smaller_values(config: PPOStageConfig, name: str) -> dict[str, list[Any]]:
    role = config.pools.role(name)  # type: ignore[arg-type] - one of the roles
    tokens = {"ppo.micro_batch_tokens": _halvings(config.ppo.micro_batch_tokens)}
    if isinstance(role, TrainedRoleConfig):
        workers = _doublings(role.num_workers, config.ppo.global_batch_size)
        choices = _engine_values(f"pools.{name}.engine", role.engine, tokens)
        return choices | {f"pools.{name}.num_workers": workers}
    if name == "rollout":
        return {"rollout.batch_tokens": _halvings(config.rollout.batch_tokens)}
    if name == "reference" and not config.pools.reference.zero_stage:
        workers = _doublings(role.num_workers, config.ppo.rollout_batch_size)
        return tokens | {"pools.reference.zero_stage": [3], "pools.reference.num_workers": workers}
    return tokens


def _engine_values(
    key: str, engine: EngineConfig, micro_batch: dict[str, list[Any]]
) -> dict[str, list[Any]]:
    return {
        f"{key}.zero_stage": list(range(engine.zero_stage + 1, 4)),
        f"{key}.activation_checkpointing": [] if engine.activation_checkpointing else [True],
        **micro_batch,
        f"{key}.offload_optimizer": [] if engine.offload_optimizer else [True],
    }


def _halvings(value: int) -> list[int]:
    return [value >> times for times in range(1, 20) if value >> times]


def _doublings(workers: int, most: int) -> list[int]:
    return [workers << times for times in range(1, 10) if workers << times <= most]


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

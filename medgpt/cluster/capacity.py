"""Check that the cluster can hold a stage's workers before anything is loaded."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from medgpt.cluster.ray_internals import autoscaler_pb2, global_worker, ray_state
from medgpt.config.base import ConfigError
from medgpt.config.pools import RoleConfig
from medgpt.config.train import ClusterConfig

Resources = Mapping[str, float]
Demands = Mapping[str, RoleConfig]
"""Groups of workers that must run at the same time, by their config key."""
PREDEFINED_RESOURCES = ("CPU", "GPU")  # users name the others
EPSILON = 1e-6  # sums of fractions are not exact


@dataclass(frozen=True)
class NodeGroup:
    """Nodes with the same resources and labels."""

    resources: dict[str, float]
    labels: Mapping[str, str] | None
    """None if unknown, as for nodes that the autoscaler would add."""
    count: float

    def fits(self, bundle: Resources, labels: Mapping[str, str]) -> bool:
        if self.labels is not None and not labels.items() <= self.labels.items():
            return False
        return all(self.resources.get(name, 0) + EPSILON >= n for name, n in bundle.items())


def worker_bundle(config: RoleConfig) -> dict[str, float]:
    """Return the resources that one worker reserves."""
    resources = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker, **config.resources}
    return {name: amount for name, amount in resources.items() if amount}


def _total_need(config: RoleConfig) -> dict[str, float]:
    return {key: amount * config.num_workers for key, amount in worker_bundle(config).items()}


def worker_demands(cluster: ClusterConfig) -> dict[str, RoleConfig]:
    """Return the demand of the fewest training workers."""
    workers = RoleConfig(
        num_workers=cluster.min_workers,
        cpus_per_worker=cluster.cpus_per_worker,
        gpus_per_worker=cluster.gpus_per_worker,
        labels=cluster.labels,
    )
    return {f"cluster.num_workers={cluster.workers_text}": workers}


def pool_demands(roles: Mapping[str, RoleConfig]) -> dict[str, RoleConfig]:
    return {f"pools.{name}": config for name, config in roles.items()}


def check_capacity(demands: Demands, *, data_cpus: float) -> None:
    """Raise ConfigError if the cluster, at its largest, cannot hold all workers at once.

    Refuses only what can never be placed; Ray decides how workers pack on nodes. `data_cpus` are
    the CPUs of one data task, which runs beside the workers.
    """
    if has_autoscaler() and max_cluster_resources() is None:
        return  # the autoscaler does not publish its limits
    present, addable = cluster_nodes()
    check_demands(demands, present, addable, data_cpus=data_cpus)


def check_demands(
    demands: Demands,
    present: Sequence[NodeGroup],
    addable: Sequence[NodeGroup],
    *,
    data_cpus: float,
) -> None:
    """Run `check_capacity` on a cluster with these nodes. Raises ConfigError."""
    cluster = _describe_cluster(present, addable)
    node_groups = [*present, *addable]
    totals = total_resources(present), total_resources(addable)  # may count the same nodes
    limits = {key: max(total.get(key, 0) for total in totals) for total in totals for key in total}
    reserved: dict[str, float] = {"CPU": data_cpus}
    for name, config in demands.items():
        if config.share_with is not None:
            continue
        bundle = worker_bundle(config)
        workers = _describe_workers(name, config)
        fitting = [nodes for nodes in node_groups if nodes.fits(bundle, config.labels)]
        _check_nodes(config, fitting, workers, cluster)
        for key, amount in _total_need(config).items():
            if reserved.get(key, 0) + amount > limits.get(key, 0) + EPSILON:
                others = _describe_resources({key: reserved.get(key, 0)})
                raise ConfigError(
                    f"{workers} can never be placed: data tasks and pools before it use {others} "
                    f"of {limits.get(key, 0):g}; {cluster}; lower num_workers, cpus_per_worker "
                    "or gpus_per_worker (fractions are fine), let roles of [pools] share bundles "
                    "by share_with, or use a larger cluster"
                )
            reserved[key] = reserved.get(key, 0) + amount


def _check_nodes(
    config: RoleConfig, fitting: Sequence[NodeGroup], workers: str, cluster: str
) -> None:
    """Raise ConfigError if the nodes that fit one worker cannot satisfy `strategy`."""
    if not fitting:
        raise ConfigError(f"{workers} can never be placed: no node can hold one; {cluster}")
    packed = config.strategy == "STRICT_PACK"
    if packed and not any(nodes.fits(_total_need(config), config.labels) for nodes in fitting):
        raise ConfigError(
            f"{workers} can never be placed: strategy=STRICT_PACK needs all workers on one node, "
            f"and none is large enough; {cluster}"
        )
    spread = config.strategy == "STRICT_SPREAD"
    if spread and sum(nodes.count for nodes in fitting) < config.num_workers:
        raise ConfigError(
            f"{workers} can never be placed: strategy=STRICT_SPREAD needs a node for each worker; "
            f"{cluster}"
        )


def max_concurrent_trials(
    trial: Mapping[str, RoleConfig],
    shared: Mapping[str, RoleConfig],
    nodes: Sequence[NodeGroup],
    *,
    data_cpus: float,
    limit: int,
) -> int:
    """Return how many tuning trials, at most `limit`, fit beside the shared pools and a data task.

    Places each worker, largest first, on the first node with enough resources. Ray may place them
    differently; a trial that does not fit waits.
    """
    shared = {**shared, "data": RoleConfig(cpus_per_worker=data_cpus)}
    max_workers = sum(config.num_workers for config in [*shared.values(), *trial.values()] * limit)
    free = [
        NodeGroup(dict(node.resources), node.labels, 1)
        for node in nodes
        for _ in range(int(min(node.count, max_workers)))
    ]
    if not _reserve(shared, free):
        return 0
    return next((count for count in range(limit) if not _reserve(trial, free)), limit)


def _reserve(roles: Mapping[str, RoleConfig], free: Sequence[NodeGroup]) -> bool:
    """Subtract the workers from `free`. False if one does not fit; others are subtracted then."""
    hosts = [config for config in roles.values() if config.share_with is None]
    workers = [config for config in hosts for _ in range(config.num_workers)]
    for config in sorted(workers, key=lambda c: (-c.gpus_per_worker, -c.cpus_per_worker)):
        bundle = worker_bundle(config)
        node = next((node for node in free if node.fits(bundle, config.labels)), None)
        if node is None:
            return False
        for name, amount in bundle.items():
            node.resources[name] -= amount
    return True


def _describe_workers(name: str, config: RoleConfig) -> str:
    labels = "".join(f", {key}={value}" for key, value in config.labels.items())
    return f"{name} ({config.num_workers} x ({_describe_resources(worker_bundle(config))}{labels}))"


def cluster_nodes() -> tuple[list[NodeGroup], list[NodeGroup]]:
    """Return the living nodes and the nodes an autoscaler may run at most, if any."""
    present = [
        NodeGroup(schedulable_resources(node["Resources"]), node["Labels"], 1)
        for node in ray.nodes()
        if node["Alive"]
    ]
    config = ray_state.get_cluster_config()
    if max_cluster_resources() is None or config is None:
        return present, []
    return present, [
        NodeGroup(
            schedulable_resources(group.resources),
            None,
            math.inf if group.max_count < 0 else group.max_count,
        )
        for group in config.node_group_configs
        if group.resources and group.max_count
    ]


def autoscaling_state() -> Any | None:
    """Return the latest AutoscalingState of a version 2 autoscaler, or None without one."""
    reply = autoscaler_pb2.GetClusterStatusReply()
    worker: Any = global_worker
    reply.ParseFromString(worker.gcs_client.get_cluster_status())
    state = reply.autoscaling_state
    return state if state.autoscaler_state_version else None


def max_cluster_resources() -> Mapping[str, float] | None:
    """Return the resources the cluster can grow to, if `clusters/publish_limits.py` set them."""
    return ray_state.get_max_resources_from_cluster_config()


def has_autoscaler() -> bool:
    return max_cluster_resources() is not None or autoscaling_state() is not None


def schedulable_resources(resources: Mapping[str, float]) -> dict[str, float]:
    """Drop the resources that Ray adds itself: memory, node:1.2.3.4, accelerator_type:H100."""
    return {
        name: float(amount)
        for name, amount in sorted(resources.items())
        if name in PREDEFINED_RESOURCES or not (":" in name or "memory" in name)
    }


def total_resources(nodes: Sequence[NodeGroup]) -> dict[str, float]:
    """Return the summed resources of all nodes."""
    total: dict[str, float] = {}
    for group in nodes:
        for name, amount in group.resources.items():
            total[name] = total.get(name, 0) + (amount * group.count if amount else 0)
    return total


def _describe_cluster(present: Sequence[NodeGroup], addable: Sequence[NodeGroup]) -> str:
    kinds: dict[str, float] = {}
    for nodes in present:
        text = _describe_resources(nodes.resources)
        kinds[text] = kinds.get(text, 0) + nodes.count
    present_text = ", ".join(f"{count:g} x ({text})" for text, count in kinds.items())
    if not addable:
        return f"the cluster has {present_text} and no autoscaler"
    addable_text = ", ".join(
        f"{nodes.count:g} x ({_describe_resources(nodes.resources)})" for nodes in addable
    )
    return f"the cluster has {present_text}, its autoscaler may run up to {addable_text}"


def _describe_resources(resources: Resources) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items()) or "nothing"

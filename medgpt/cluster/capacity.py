"""Check that the cluster can hold a stage's workers before anything is loaded."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray

from medgpt.cluster.autoscaler import has_autoscaler, max_cluster_resources
from medgpt.cluster.ray_internals import ray_state
from medgpt.config.base import ConfigError
from medgpt.config.pools import RoleConfig
from medgpt.config.train import ClusterConfig

Resources = Mapping[str, float]
Demands = Mapping[str, RoleConfig]
"""Groups of workers that must run at the same time, by their config key."""
PREDEFINED_RESOURCES = ("CPU", "GPU")  # users name the others


@dataclass(frozen=True)
class NodeGroup:
    """Nodes with the same resources and labels."""

    resources: Resources
    labels: Mapping[str, str] | None
    """None if unknown, as for nodes that the autoscaler would add."""
    count: float

    def fits(self, bundle: Resources, labels: Mapping[str, str]) -> bool:
        labels_match = self.labels is None or labels.items() <= self.labels.items()
        return labels_match and all(self.resources.get(name, 0) >= n for name, n in bundle.items())


def worker_bundle(config: RoleConfig) -> dict[str, float]:
    """Return the resources that one worker reserves."""
    resources = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker, **config.resources}
    return {name: amount for name, amount in resources.items() if amount}


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
    """Check that the cluster, at its largest, can hold all workers at once.

    Refuses only what can certainly never be placed; Ray decides how workers pack on nodes.

    Args:
        data_cpus: CPUs of one data task, which runs beside the workers.

    Raises:
        ConfigError: some workers never fit.
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
    present_total, max_added = (
        _total_resources(present),
        _total_resources(addable),
    )  # both may count the same nodes
    limits = {
        key: max(present_total.get(key, 0), max_added.get(key, 0))
        for key in present_total.keys() | max_added.keys()
    }
    reserved: dict[str, float] = {"CPU": data_cpus}
    for name, config in demands.items():
        if config.share_with is not None:
            continue
        bundle = worker_bundle(config)
        workers = _describe_workers(name, config)
        _check_nodes(
            config,
            [nodes for nodes in node_groups if nodes.fits(bundle, config.labels)],
            workers,
            cluster,
        )
        total_need = {key: amount * config.num_workers for key, amount in bundle.items()}
        for key, amount in total_need.items():
            if reserved.get(key, 0) + amount > limits.get(key, 0) + 1e-6:
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
    total_need = {key: amount * config.num_workers for key, amount in worker_bundle(config).items()}
    packed = config.strategy == "STRICT_PACK"
    if packed and not any(nodes.fits(total_need, config.labels) for nodes in fitting):
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


def schedulable_resources(resources: Mapping[str, float]) -> dict[str, float]:
    """Drop the resources that Ray adds itself: memory, node:1.2.3.4, accelerator_type:H100."""
    return {
        name: float(amount)
        for name, amount in sorted(resources.items())
        if name in PREDEFINED_RESOURCES or not (":" in name or "memory" in name)
    }


def _total_resources(nodes: Sequence[NodeGroup]) -> dict[str, float]:
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

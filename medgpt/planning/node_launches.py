"""The nodes that the autoscaler launches for a stage, computed by Ray's own scheduler."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

from medgpt.cluster.capacity import Demands, check_demands, worker_bundle
from medgpt.cluster.ray_internals import autoscaler_pb2, common_pb2
from medgpt.config.base import ConfigError
from medgpt.config.pools import RoleConfig
from medgpt.planning.hardware import NodeType, PlannedCluster

UNLIMITED_NODES = 10_000  # limit of a type that has none


@dataclass(frozen=True)
class NodeLaunches:
    """Number of nodes by type, including the head."""

    nodes: Mapping[str, int]
    price_per_hour: float | None
    """In the currency of the cluster; None: a price is unknown."""


def plan_node_launches(
    cluster: PlannedCluster, demands: Demands, *, data_cpus: float
) -> NodeLaunches:
    """Return the nodes for all workers and a data task at the same time, from an empty cluster.

    Raises:
        ConfigError: a worker can never be placed.
    """
    addable = [node.to_node_group() for node in cluster.workers]
    check_demands(demands, [cluster.head.to_node_group()], addable, data_cpus=data_cpus)
    bundle_roles = {name: role for name, role in demands.items() if role.share_with is None}
    groups = {**bundle_roles, "data": RoleConfig(cpus_per_worker=data_cpus)}
    gangs = {name: _gang_request(name, role) for name, role in groups.items()}
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs={node.name: _node_type_config(node) for node in cluster.workers},
            gang_resource_requests=list(gangs.values()),
        )
    )
    refused = reply.infeasible_gang_resource_requests
    if infeasible := [name for name, gang in gangs.items() if gang in refused]:
        raise ConfigError(_refusal(cluster, demands, infeasible))
    nodes = Counter({launch.instance_type: launch.count for launch in reply.to_launch})
    if nodes.total() > cluster.max_workers:  # Ray would launch them and terminate some again
        raise ConfigError(_refusal(cluster, demands, list(bundle_roles)))
    nodes = {cluster.head.name: 1, **nodes}
    return NodeLaunches(nodes, _price_per_hour(cluster, nodes))


def _refusal(cluster: PlannedCluster, demands: Demands, infeasible: Sequence[str]) -> str:
    unplaced = " and ".join(
        f"{name} ({demands[name].num_workers} x "
        f"({describe_resources(worker_bundle(demands[name]))}))"
        for name in infeasible
        if name in demands
    )
    types = ", ".join(
        f"{n.max_nodes:g} x {n.name} ({describe_resources(n.resources)})" for n in cluster.workers
    )
    return (
        f"--cluster={cluster.file}: no room for {unplaced or 'a data task'} beside the other "
        f"workers of the job; the autoscaler may start {types}, "
        f"{cluster.max_workers:g} in all; use fewer or smaller workers, or raise max_workers there"
    )


def describe_resources(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{n:g} {key}" for key, n in resources.items() if n and "memory" not in key)


def _price_per_hour(cluster: PlannedCluster, nodes: Mapping[str, int]) -> float | None:
    """Return the price of the nodes per hour in the cluster's currency; None if unknown."""
    used = [node for node in (cluster.head, *cluster.workers) if nodes.get(node.name)]
    prices = [node.price_per_hour for node in used if node.price_per_hour is not None]
    if len(prices) < len(used):
        return None
    return sum(nodes[node.name] * price for node, price in zip(used, prices, strict=True))


def _node_type_config(node: NodeType) -> NodeTypeConfig:
    return NodeTypeConfig(
        name=node.name,
        min_worker_nodes=node.min_nodes,
        max_worker_nodes=UNLIMITED_NODES if math.isinf(node.max_nodes) else int(node.max_nodes),
        resources=dict(node.resources),
        labels=dict(node.labels),
    )


def _gang_request(name: str, role: RoleConfig) -> Any:
    """Return the request for the placement group of a pool, as Ray sends it to its autoscaler."""
    kinds = ResourceRequestUtil.PlacementConstraintType
    constraints = {
        "STRICT_PACK": [(kinds.AFFINITY, "_PG", name)],
        "STRICT_SPREAD": [(kinds.ANTI_AFFINITY, "_PG", name)],
    }.get(role.strategy)
    label_in = common_pb2.LabelSelectorOperator.LABEL_OPERATOR_IN
    labels = [(key, label_in, [value]) for key, value in role.labels.items()]
    requests = [
        ResourceRequestUtil.make(worker_bundle(role), constraints, [labels] if labels else None)
        for _ in range(role.num_workers)
    ]
    return autoscaler_pb2.GangResourceRequest(requests=requests)

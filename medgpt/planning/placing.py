"""What an autoscaler would start for the bundles of a job, as Ray's own scheduler decides."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

from medgpt.cluster.capacity import Claims, bundle, check
from medgpt.cluster.ray_internals import GangResourceRequest, LabelSelectorOperator
from medgpt.config.base import ConfigError
from medgpt.config.pools import RoleConfig
from medgpt.planning.hardware import Cluster, NodeType

MOST_NODES = 10_000  # of a type without a limit


@dataclass(frozen=True)
class Started:
    """Nodes by type, the head among them."""

    nodes: Mapping[str, int]
    price_per_hour: float | None
    """None: a price is not known."""


def start(cluster: Cluster, claims: Claims, *, data_cpus: float) -> Started:
    """The nodes for all workers at once and a data task, from an empty cluster.

    Raises:
        ConfigError: some can never be placed.
    """
    addable = [node.as_nodes() for node in cluster.workers]
    check(claims, [cluster.head.as_nodes()], addable, data_cpus=data_cpus)
    own = {name: role for name, role in claims.items() if role.share_with is None}
    tasks = RoleConfig(cpus_per_worker=data_cpus)
    gangs = {name: _gang(name, role) for name, role in own.items()} | {"data": _gang("data", tasks)}
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs={node.name: _config(node) for node in cluster.workers},
            gang_resource_requests=list(gangs.values()),
        )
    )
    if homeless := [
        name for name, gang in gangs.items() if gang in reply.infeasible_gang_resource_requests
    ]:
        raise ConfigError(_refusal(cluster, claims, homeless))
    nodes = Counter({launch.instance_type: launch.count for launch in reply.to_launch})
    if nodes.total() > cluster.most_workers:  # Ray starts them, and ends some again
        raise ConfigError(_refusal(cluster, claims, list(own)))
    nodes = {cluster.head.name: 1, **nodes}
    return Started(nodes, _price(cluster, nodes))


def _refusal(cluster: Cluster, claims: Claims, homeless: Sequence[str]) -> str:
    wanted = " and ".join(
        f"{name} ({claims[name].num_workers} x ({told(bundle(claims[name]))}))"
        for name in homeless
        if name in claims
    )
    types = ", ".join(f"{n.most:g} x {n.name} ({told(n.resources)})" for n in cluster.workers)
    return (
        f"--cluster={cluster.file}: no room for {wanted or 'a data task'} beside what else the job "
        f"needs; the autoscaler may start {types}, {cluster.most_workers:g} in all; use fewer "
        "or smaller workers, or raise max_workers there"
    )


def told(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{n:g} {key}" for key, n in resources.items() if n and "memory" not in key)


def _price(cluster: Cluster, nodes: Mapping[str, int]) -> float | None:
    """Of an hour, in the cluster's currency."""
    total = 0.0
    for node in (cluster.head, *cluster.workers):
        if nodes.get(node.name) and node.price_per_hour is None:
            return None
        total += nodes.get(node.name, 0) * (node.price_per_hour or 0)
    return total


def _config(node: NodeType) -> NodeTypeConfig:
    return NodeTypeConfig(
        name=node.name,
        min_worker_nodes=node.fewest,
        max_worker_nodes=MOST_NODES if math.isinf(node.most) else int(node.most),
        resources=dict(node.resources),
        labels=dict(node.labels),
    )


def _gang(name: str, role: RoleConfig) -> GangResourceRequest:
    """The placement group of a pool, as Ray tells it to its autoscaler."""
    kinds = ResourceRequestUtil.PlacementConstraintType
    constraints = {
        "STRICT_PACK": [(kinds.AFFINITY, "_PG", name)],
        "STRICT_SPREAD": [(kinds.ANTI_AFFINITY, "_PG", name)],
    }.get(role.strategy)
    equal = LabelSelectorOperator.LABEL_OPERATOR_IN
    labels = [(key, equal, [value]) for key, value in role.labels.items()]
    requests = [
        ResourceRequestUtil.make(bundle(role), constraints, [labels] if labels else None)
        for _ in range(role.num_workers)
    ]
    return GangResourceRequest(requests=requests)

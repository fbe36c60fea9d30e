"""What workers need and what the cluster can hold, before anything is loaded."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray

from medgpt.cluster.autoscaler import limits, may_grow
from medgpt.cluster.ray_internals import ray_state
from medgpt.config.base import ConfigError
from medgpt.config.pools import RoleConfig
from medgpt.config.train import ClusterConfig

Amounts = Mapping[str, float]
Claims = Mapping[str, RoleConfig]
"""Workers that must be there at the same time, by what the config calls them."""
OWN = ("CPU", "GPU")  # of Ray's resources; others are named by the user


@dataclass(frozen=True)
class Nodes:
    """Nodes that are alike."""

    resources: Amounts
    labels: Mapping[str, str] | None
    """None: of nodes that the autoscaler would add they are not known."""
    count: float

    def fits(self, need: Amounts, labels: Mapping[str, str]) -> bool:
        known = self.labels is None or labels.items() <= self.labels.items()
        return known and all(self.resources.get(name, 0) >= n for name, n in need.items())


def bundle(config: RoleConfig) -> dict[str, float]:
    """What one worker reserves."""
    one = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker, **config.resources}
    return {name: amount for name, amount in one.items() if amount}


def of_workers(cluster: ClusterConfig) -> dict[str, RoleConfig]:
    """The fewest training processes."""
    workers = RoleConfig(
        num_workers=cluster.fewest_workers,
        cpus_per_worker=cluster.cpus_per_worker,
        gpus_per_worker=cluster.gpus_per_worker,
        labels=cluster.labels,
    )
    return {f"cluster.num_workers={cluster.workers}": workers}


def of_pools(roles: Mapping[str, RoleConfig]) -> dict[str, RoleConfig]:
    return {f"pools.{name}": config for name, config in roles.items()}


def preflight(claims: Claims, *, data_cpus: float) -> None:
    """Check that the cluster, grown as far as its autoscaler may, can hold all workers at once.

    Only what certainly cannot be placed is refused; how workers pack on nodes is Ray's business.

    Args:
        data_cpus: what one data task needs beside them.

    Raises:
        ConfigError: names the workers, what there is and what could be added.
    """
    if may_grow() and limits() is None:
        return  # how far, the autoscaler does not tell
    present, addable = cluster_nodes()
    check(claims, present, addable, data_cpus=data_cpus)


def check(
    claims: Claims,
    present: Sequence[Nodes],
    addable: Sequence[Nodes],
    *,
    data_cpus: float,
) -> None:
    """`preflight` of a cluster with these nodes. Raises ConfigError."""
    cluster = _told(present, addable)
    every = [*present, *addable]
    now, grown = _sum(present), _sum(addable)  # which may count the same nodes
    most = {key: max(now.get(key, 0), grown.get(key, 0)) for key in now.keys() | grown.keys()}
    used: dict[str, float] = {"CPU": data_cpus}
    for name, config in claims.items():
        if config.share_with is not None:
            continue
        need = bundle(config)
        workers = _described(name, config)
        _check_nodes(
            config, [nodes for nodes in every if nodes.fits(need, config.labels)], workers, cluster
        )
        together = {key: amount * config.num_workers for key, amount in need.items()}
        for key, amount in together.items():
            if used.get(key, 0) + amount > most.get(key, 0) + 1e-6:
                others = _amounts({key: used.get(key, 0)})
                raise ConfigError(
                    f"{workers} can never be placed: data tasks and pools before it take {others} "
                    f"of {most.get(key, 0):g}; {cluster}; lower num_workers, cpus_per_worker or "
                    "gpus_per_worker (fractions are fine), let roles of [pools] share bundles by "
                    "share_with, or use a larger cluster"
                )
            used[key] = used.get(key, 0) + amount


def _check_nodes(config: RoleConfig, fitting: Sequence[Nodes], workers: str, cluster: str) -> None:
    """Whether nodes that can hold one worker, `fitting`, can hold them as `strategy` wants."""
    if not fitting:
        raise ConfigError(f"{workers} can never be placed: no node is like that; {cluster}")
    together = {key: amount * config.num_workers for key, amount in bundle(config).items()}
    packed = config.strategy == "STRICT_PACK"
    if packed and not any(nodes.fits(together, config.labels) for nodes in fitting):
        raise ConfigError(
            f"{workers} can never be placed: strategy=STRICT_PACK wants all workers on one node, "
            f"and none is large enough; {cluster}"
        )
    spread = config.strategy == "STRICT_SPREAD"
    if spread and sum(nodes.count for nodes in fitting) < config.num_workers:
        raise ConfigError(
            f"{workers} can never be placed: strategy=STRICT_SPREAD wants a node for each worker; "
            f"{cluster}"
        )


def _described(name: str, config: RoleConfig) -> str:
    labels = "".join(f", {key}={value}" for key, value in config.labels.items())
    return f"{name} ({config.num_workers} x ({_amounts(bundle(config))}{labels}))"


def cluster_nodes() -> tuple[list[Nodes], list[Nodes]]:
    """Living nodes, and all that an autoscaler may have at once (none without one)."""
    present = [
        Nodes(named(node["Resources"]), node["Labels"], 1) for node in ray.nodes() if node["Alive"]
    ]
    config = ray_state.get_cluster_config()
    if limits() is None or config is None:
        return present, []
    return present, [
        Nodes(named(group.resources), None, math.inf if group.max_count < 0 else group.max_count)
        for group in config.node_group_configs
        if group.resources and group.max_count
    ]


def named(resources: Mapping[str, float]) -> dict[str, float]:
    """Without what Ray adds for itself: memory, node:1.2.3.4, accelerator_type:H100."""
    return {
        name: float(amount)
        for name, amount in sorted(resources.items())
        if name in OWN or not (":" in name or "memory" in name)
    }


def _sum(nodes: Sequence[Nodes]) -> dict[str, float]:
    total: dict[str, float] = {}
    for one in nodes:
        for name, amount in one.resources.items():
            total[name] = total.get(name, 0) + (amount * one.count if amount else 0)
    return total


def _told(present: Sequence[Nodes], addable: Sequence[Nodes]) -> str:
    kinds: dict[str, float] = {}
    for nodes in present:
        text = _amounts(nodes.resources)
        kinds[text] = kinds.get(text, 0) + nodes.count
    has = ", ".join(f"{count:g} x ({text})" for text, count in kinds.items())
    if not addable:
        return f"the cluster has {has} and no autoscaler"
    more = ", ".join(f"{nodes.count:g} x ({_amounts(nodes.resources)})" for nodes in addable)
    return f"the cluster has {has}, its autoscaler may have up to {more}"


def _amounts(resources: Amounts) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items()) or "nothing"

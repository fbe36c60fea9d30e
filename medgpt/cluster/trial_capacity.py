"""Estimate how many tuning trials fit into the cluster at the same time."""

from collections.abc import Mapping, Sequence

from medgpt.cluster.capacity import NodeGroup, worker_bundle
from medgpt.config.pools import RoleConfig

Free = dict[str, float]


def max_concurrent_trials(
    trial: Mapping[str, RoleConfig],
    shared: Mapping[str, RoleConfig],
    nodes: Sequence[NodeGroup],
    *,
    data_cpus: float,
    limit: int,
) -> int:
    """Return how many trials, at most `limit`, fit beside the shared pools and one data task.

    Places each worker, largest first, on the first node with enough resources. Ray may place them
    differently; a trial that does not fit waits.
    """
    free = [
        (node, dict(node.resources))
        for node in nodes
        for _ in range(int(min(node.count, _max_nodes_needed(trial, shared, limit))))
    ]
    data = RoleConfig(cpus_per_worker=data_cpus)
    if not _reserve({**shared, "data": data}, free):
        return 0
    return next((count for count in range(limit) if not _reserve(trial, free)), limit)


def _max_nodes_needed(
    trial: Mapping[str, RoleConfig], shared: Mapping[str, RoleConfig], limit: int
) -> int:
    """Return an upper bound on the nodes that `limit` trials could use."""
    workers = sum(config.num_workers for config in trial.values()) * limit
    return workers + sum(config.num_workers for config in shared.values()) + 1


def _reserve(roles: Mapping[str, RoleConfig], free: list[tuple[NodeGroup, Free]]) -> bool:
    """Subtract the workers from `free`. False if one does not fit; others are subtracted then."""
    hosts = [config for config in roles.values() if config.share_with is None]
    workers = [config for config in hosts for _ in range(config.num_workers)]
    for config in sorted(workers, key=lambda c: (-c.gpus_per_worker, -c.cpus_per_worker)):
        bundle = worker_bundle(config)
        for node, left in free:
            if node.fits(bundle, config.labels) and _fits(bundle, left):
                for name, amount in bundle.items():
                    left[name] -= amount
                break
        else:
            return False
    return True


def _fits(need: Mapping[str, float], left: Free) -> bool:
    return all(left.get(name, 0) + 1e-6 >= amount for name, amount in need.items())

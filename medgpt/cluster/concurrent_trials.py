"""How many trials have room at the same time."""

from collections.abc import Mapping, Sequence

from medgpt.cluster.capacity import Nodes, bundle
from medgpt.config.pools import RoleConfig

Free = dict[str, float]


def concurrent_trials(
    trial: Mapping[str, RoleConfig],
    shared: Mapping[str, RoleConfig],
    nodes: Sequence[Nodes],
    *,
    data_cpus: float,
    limit: int,
) -> int:
    """Trials, at most `limit`, that `nodes` hold beside the shared pools and one data task.

    Workers are put on the first node with room, the largest first. How Ray places them may differ;
    a trial without room waits for it.
    """
    free = [
        (node, dict(node.resources))
        for node in nodes
        for _ in range(int(min(node.count, _most(trial, shared, limit))))
    ]
    data = RoleConfig(cpus_per_worker=data_cpus)
    if not _place({**shared, "data": data}, free):
        return 0
    return next((count for count in range(limit) if not _place(trial, free)), limit)


def _most(trial: Mapping[str, RoleConfig], shared: Mapping[str, RoleConfig], limit: int) -> int:
    """Nodes that so many trials could fill."""
    workers = sum(config.num_workers for config in trial.values()) * limit
    return workers + sum(config.num_workers for config in shared.values()) + 1


def _place(roles: Mapping[str, RoleConfig], free: list[tuple[Nodes, Free]]) -> bool:
    """Take the room of all workers, or say that there is none; then some of it is taken."""
    own = [config for config in roles.values() if config.share_with is None]
    each = [config for config in own for _ in range(config.num_workers)]
    for config in sorted(each, key=lambda c: (-c.gpus_per_worker, -c.cpus_per_worker)):
        need = bundle(config)
        for node, left in free:
            if node.fits(need, config.labels) and _fits(need, left):
                for name, amount in need.items():
                    left[name] -= amount
                break
        else:
            return False
    return True


def _fits(need: Mapping[str, float], left: Free) -> bool:
    return all(left.get(name, 0) + 1e-6 >= amount for name, amount in need.items())

"""Room in the cluster for a stage's workers: there, on its way, or never to come."""

import time
from collections.abc import Callable, Mapping

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from medgpt.cluster.autoscaler import autoscaling_state, limits, may_grow
from medgpt.cluster.capacity import of_workers, preflight
from medgpt.config.base import ConfigError
from medgpt.config.train import ClusterConfig

PAUSE_S = 1  # between looks whether there is room

Amounts = Mapping[str, float]


def await_room(cluster: ClusterConfig, say: Callable[[str], None]) -> None:
    """Return when the cluster can hold the fewest workers and one data task beside them.

    Raises:
        ConfigError: it never can, or not within `cluster.wait_s`.
    """
    preflight(of_workers(cluster), data_cpus=cluster.data_cpus)
    remedy = "lower cluster.num_workers or the CPUs or GPUs of each, or use a larger cluster"
    lack = _lacking(cluster, _resources({}), _resources(cluster.labels))
    if not lack:
        return
    most = limits()
    if never := lack if not may_grow() else _lacking(cluster, most, most) if most else "":
        raise ConfigError(f"cluster.num_workers={cluster.workers} {never} at most; {remedy}")
    say(f"waiting up to {cluster.wait_s:g} s for the cluster to grow: {lack} now")
    group = _ask(cluster)
    try:
        if not _placed(group, cluster.wait_s, say):
            raise ConfigError(
                f"cluster.num_workers={cluster.workers} "
                f"{_lacking(cluster, _resources({}), _resources(cluster.labels)) or 'has no room'} "
                f"after cluster.wait_s={cluster.wait_s:g} s; {remedy}"
            )
    finally:
        remove_placement_group(group)


def await_data_room(cluster: ClusterConfig, say: Callable[[str], None]) -> None:
    """Return when the cluster can hold one data task.

    Raises:
        ConfigError: it cannot within `cluster.wait_s`.
    """
    need = cluster.data_cpus
    if any(node["Alive"] and node["Resources"].get("CPU", 0) >= need for node in ray.nodes()):
        return
    wait_s = cluster.wait_s
    say(f"waiting up to {wait_s:g} s for the cluster to grow: a data task needs {need:g} CPU")
    group = placement_group([{"CPU": need}])
    try:
        if not _placed(group, wait_s, say):
            raise ConfigError(
                f"cluster.data_cpus={need:g}: no node has room for a data task after "
                f"cluster.wait_s={wait_s:g} s; lower it, or use a larger cluster"
            )
    finally:
        remove_placement_group(group)


def _ask(cluster: ClusterConfig) -> PlacementGroup:
    """A reservation that the autoscaler sees; a call of its request_resources outlives the job."""
    worker = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    workers = [{name: n for name, n in worker.items() if n}] * cluster.fewest_workers
    return placement_group(
        [*workers, {"CPU": cluster.data_cpus}],
        bundle_label_selector=[*[cluster.labels] * len(workers), {}],
    )


def _placed(group: PlacementGroup, seconds: float, say: Callable[[str], None]) -> bool:
    deadline, told = time.monotonic() + seconds, False
    while not group.wait(PAUSE_S):
        if time.monotonic() > deadline:
            return False
        if not told and _has_no_nodes_for(group):
            say("its autoscaler has no nodes left that could hold this; it may when others end")
            told = True
    return True


def _has_no_nodes_for(group: PlacementGroup) -> bool:
    """Whether the autoscaler says so."""
    state = autoscaling_state()
    gangs = state.infeasible_gang_resource_requests if state is not None else []
    return any(group.id.hex() in gang.details for gang in gangs)


def _resources(labels: Mapping[str, str]) -> dict[str, float]:
    """Of all living nodes with these labels."""
    total: dict[str, float] = {}
    for node in ray.nodes():
        if node["Alive"] and labels.items() <= node["Labels"].items():
            for name, amount in node["Resources"].items():
                total[name] = total.get(name, 0) + amount
    return total


def _lacking(cluster: ClusterConfig, have: Amounts, labelled: Amounts) -> str:
    """What is short of all resources, or of those of nodes with the workers' labels."""
    workers = {
        "CPU": cluster.fewest_workers * cluster.cpus_per_worker,
        "GPU": cluster.fewest_workers * cluster.gpus_per_worker,
    }
    together = workers | {"CPU": workers["CPU"] + cluster.data_cpus}
    where = " and ".join(f"{key}={value}" for key, value in cluster.labels.items())
    short = [
        f"needs {amount:g} {name} in all (data tasks included), the cluster has "
        f"{have.get(name, 0):g}"
        for name, amount in together.items()
        if amount > have.get(name, 0)
    ] or [
        f"needs {amount:g} {name} on nodes with {where}, which have {labelled.get(name, 0):g}"
        for name, amount in workers.items()
        if amount > labelled.get(name, 0)
    ]
    return " and ".join(short)

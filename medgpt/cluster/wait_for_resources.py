"""Wait until the cluster has the resources for a stage's workers and data tasks."""

import time
from collections.abc import Callable, Mapping

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from medgpt.cluster.autoscaler import autoscaling_state, has_autoscaler, max_cluster_resources
from medgpt.cluster.capacity import check_capacity, worker_demands
from medgpt.config.base import ConfigError
from medgpt.config.train import ClusterConfig

POLL_S = 1  # between checks of a placement group

Resources = Mapping[str, float]


def wait_for_resources(cluster: ClusterConfig, say: Callable[[str], None]) -> None:
    """Wait until the cluster can hold the fewest workers and one data task beside them.

    Raises:
        ConfigError: it never can, or not within `cluster.wait_s`.
    """
    check_capacity(worker_demands(cluster), data_cpus=cluster.data_cpus)
    remedy = "lower cluster.num_workers or the CPUs or GPUs of each, or use a larger cluster"
    shortage = _shortage_now(cluster)
    if not shortage:
        return
    lasting_shortage = shortage
    if has_autoscaler():
        limits = max_cluster_resources()
        lasting_shortage = _describe_shortage(cluster, limits, limits) if limits else ""
    if lasting_shortage:
        raise ConfigError(
            f"cluster.num_workers={cluster.workers_text} {lasting_shortage} at most; {remedy}"
        )
    say(f"waiting up to {cluster.wait_s:g} s for the cluster to grow: {shortage} now")
    group = _request_placement(cluster)
    try:
        if not _wait_until_placed(group, cluster.wait_s, say):
            raise ConfigError(
                f"cluster.num_workers={cluster.workers_text} "
                f"{_shortage_now(cluster) or 'was not placed'} "
                f"after cluster.wait_s={cluster.wait_s:g} s; {remedy}"
            )
    finally:
        remove_placement_group(group)


def wait_for_data_task_resources(cluster: ClusterConfig, say: Callable[[str], None]) -> None:
    """Wait until the cluster can hold one data task.

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
        if not _wait_until_placed(group, wait_s, say):
            raise ConfigError(
                f"cluster.data_cpus={need:g}: no node can hold a data task after "
                f"cluster.wait_s={wait_s:g} s; lower it, or use a larger cluster"
            )
    finally:
        remove_placement_group(group)


def _request_placement(cluster: ClusterConfig) -> PlacementGroup:
    """Reserve all bundles. Unlike `request_resources`, a placement group ends with the job."""
    worker = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    workers = [{name: n for name, n in worker.items() if n}] * cluster.min_workers
    return placement_group(
        [*workers, {"CPU": cluster.data_cpus}],
        bundle_label_selector=[*[cluster.labels] * len(workers), {}],
    )


def _wait_until_placed(group: PlacementGroup, seconds: float, say: Callable[[str], None]) -> bool:
    deadline, announced = time.monotonic() + seconds, False
    while not group.wait(POLL_S):
        if time.monotonic() > deadline:
            return False
        if not announced and _is_infeasible(group):
            say("its autoscaler has no free nodes that could hold this; other jobs may free some")
            announced = True
    return True


def _is_infeasible(group: PlacementGroup) -> bool:
    """Return whether the autoscaler reports that it cannot place `group`."""
    state = autoscaling_state()
    gangs = state.infeasible_gang_resource_requests if state is not None else []
    return any(group.id.hex() in gang.details for gang in gangs)


def _total_resources(labels: Mapping[str, str]) -> dict[str, float]:
    """Return the summed resources of all living nodes with these labels."""
    total: dict[str, float] = {}
    for node in ray.nodes():
        if node["Alive"] and labels.items() <= node["Labels"].items():
            for name, amount in node["Resources"].items():
                total[name] = total.get(name, 0) + amount
    return total


def _shortage_now(cluster: ClusterConfig) -> str:
    """Describe the shortage on the present nodes."""
    return _describe_shortage(cluster, _total_resources({}), _total_resources(cluster.labels))


def _describe_shortage(cluster: ClusterConfig, total: Resources, on_labeled: Resources) -> str:
    """Describe which resources are short, in all or on nodes with the labels; empty if none."""
    workers = {
        "CPU": cluster.min_workers * cluster.cpus_per_worker,
        "GPU": cluster.min_workers * cluster.gpus_per_worker,
    }
    total_need = workers | {"CPU": workers["CPU"] + cluster.data_cpus}
    where = " and ".join(f"{key}={value}" for key, value in cluster.labels.items())
    shortages = [
        f"needs {amount:g} {name} in total (with data tasks), the cluster has "
        f"{total.get(name, 0):g}"
        for name, amount in total_need.items()
        if amount > total.get(name, 0)
    ] or [
        f"needs {amount:g} {name} on nodes with {where}, which have {on_labeled.get(name, 0):g}"
        for name, amount in workers.items()
        if amount > on_labeled.get(name, 0)
    ]
    return " and ".join(shortages)

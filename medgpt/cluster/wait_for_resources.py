"""Wait until the cluster has the resources for a stage's workers and data tasks."""

import time
from collections.abc import Callable

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from medgpt.cluster import capacity
from medgpt.config.base import ConfigError
from medgpt.config.train import ClusterConfig

POLL_S = 1  # between checks of a placement group


def waiting_line(seconds: float, purpose: str) -> str:
    """Return the console line that announces a bounded wait."""
    return f"waiting up to {seconds:g} s for {purpose}"


def wait_for_resources(cluster: ClusterConfig, say: Callable[[str], None]) -> None:
    """Wait until the cluster can hold the fewest workers and a data task, or raise ConfigError."""
    demands = capacity.worker_demands(cluster)
    capacity.check_capacity(demands, data_cpus=cluster.data_cpus)
    if not (shortage := _shortage_now(cluster)):
        return
    lasting_shortage = shortage
    if capacity.has_autoscaler():
        limits = capacity.max_cluster_resources()
        lasting_shortage = _describe_shortage(cluster, limits, limits) if limits else ""
    key = f"cluster.num_workers={cluster.workers_text}"
    remedy = "lower cluster.num_workers or the CPUs or GPUs of each, or use a larger cluster"
    if lasting_shortage:
        raise ConfigError(f"{key} {lasting_shortage} at most; {remedy}")
    bundles = [capacity.worker_bundle(demands[key])] * cluster.min_workers
    labels = [cluster.labels] * len(bundles)
    bundles, labels = [*bundles, {"CPU": cluster.data_cpus}], [*labels, {}]
    if not _can_place(bundles, labels, cluster.wait_s, say, shortage=f"{shortage} now"):
        raise ConfigError(
            f"{key} {_shortage_now(cluster) or 'was not placed'} after "
            f"cluster.wait_s={cluster.wait_s:g} s; {remedy}"
        )


def wait_for_data_task_resources(cluster: ClusterConfig, say: Callable[[str], None]) -> None:
    """Wait until the cluster can hold one data task. Raises ConfigError after `cluster.wait_s`."""
    need, wait_s = cluster.data_cpus, cluster.wait_s
    if any(node["Alive"] and node["Resources"].get("CPU", 0) >= need for node in ray.nodes()):
        return
    if not _can_place([{"CPU": need}], [{}], wait_s, say, f"a data task needs {need:g} CPU"):
        raise ConfigError(
            f"cluster.data_cpus={need:g}: no node can hold a data task after "
            f"cluster.wait_s={wait_s:g} s; lower it, or use a larger cluster"
        )


def _can_place(
    bundles: list[dict[str, float]],
    labels: list[dict[str, str]],
    wait_s: float,
    say: Callable[[str], None],
    shortage: str,
) -> bool:
    """Wait until the cluster has grown enough for `bundles`. False after `wait_s` seconds."""
    say(waiting_line(wait_s, f"the cluster to grow: {shortage}"))
    deadline, announced = time.monotonic() + wait_s, False
    # unlike a call of request_resources, a placement group ends with the job
    group = placement_group(bundles, bundle_label_selector=labels)
    try:
        while not group.wait(POLL_S):
            if time.monotonic() > deadline:
                return False
            if not announced and _is_infeasible(group):
                say("its autoscaler has no free nodes that could hold this; others may end")
                announced = True
        return True
    finally:
        remove_placement_group(group)


def _is_infeasible(group: PlacementGroup) -> bool:
    """Return whether the autoscaler reports that it cannot place `group`."""
    state = capacity.autoscaling_state()
    gangs = state.infeasible_gang_resource_requests if state is not None else []
    return any(group.id.hex() in gang.details for gang in gangs)


def _shortage_now(cluster: ClusterConfig) -> str:
    """Describe the shortage on the present nodes."""
    present, _ = capacity.cluster_nodes()
    labeled = [node for node in present if node.fits({}, cluster.labels)]
    return _describe_shortage(
        cluster, capacity.total_resources(present), capacity.total_resources(labeled)
    )


def _describe_shortage(
    cluster: ClusterConfig, total: capacity.Resources, on_labeled: capacity.Resources
) -> str:
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

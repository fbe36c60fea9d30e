"""Place the pools of a job: one placement group per pool, all of them or none."""

import math
import random
import re
import socket
import time
import uuid
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray import PlacementGroupID
from ray.autoscaler.sdk import request_resources
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from medgpt.cluster.capacity import worker_bundle
from medgpt.cluster.ray_internals import ray_state
from medgpt.cluster.wait_for_resources import waiting_line
from medgpt.config.base import ConfigError
from medgpt.config.pools import RoleConfig

PLACEMENT_ATTEMPT_S = 20.0  # how long part of a gang may be held while the rest is missing
CONNECT_TIMEOUT_S = 1.0  # for a node to answer
ACTOR_GROUP_NAME = re.compile(r"medgpt-\w+-([0-9a-f]+)-\w+")  # groups made by an actor
FIRST_PAUSE_S = 2.0  # mean pause before the next attempt; doubles up to the above


@dataclass(frozen=True)
class Gang:
    """Placement groups by role; a role with `share_with` has the group of its host."""

    groups: Mapping[str, PlacementGroup]

    def release(self) -> None:
        for group in {group.id: group for group in self.groups.values()}.values():
            remove_placement_group(group)

    def roles_on(self, nodes: Container[str]) -> set[str]:
        """Return the roles with a bundle on one of `nodes`, which are hexadecimal node ids."""
        tables = {role: placement_group_table(group) for role, group in self.groups.items()}
        used = {role: table["bundles_to_node_id"].values() for role, table in tables.items()}
        return {role for role, ids in used.items() if any(node in nodes for node in ids)}


def acquire_gang(
    roles: Mapping[str, RoleConfig],
    *,
    wait_s: float,
    say: Callable[[str], None],
    attempt_s: float = PLACEMENT_ATTEMPT_S,
) -> Gang:
    """Place all pools, or none of them and raise ConfigError after `wait_s`.

    A partly placed gang is released after `attempt_s` and requested again after a random pause, so
    that two jobs that each hold half of a cluster do not wait for each other forever.
    """
    deadline = time.monotonic() + wait_s
    pause, requested = min(FIRST_PAUSE_S, attempt_s), False
    try:
        while True:
            gang = _create_groups(roles)
            unplaced = _unplaced_roles(gang, min(attempt_s, max(0.0, deadline - time.monotonic())))
            if not unplaced:
                return gang
            shortage = f"{', '.join(unplaced)}, {_describe_free_resources()}"
            gang.release()
            if time.monotonic() + pause > deadline:
                raise ConfigError(
                    f"cluster.wait_s={wait_s:g}: no resources for all pools in this time: none for "
                    f"{shortage}; use fewer or smaller workers in [pools], or a larger cluster"
                )
            if not requested:
                say(waiting_line(wait_s, f"resources for all pools: none for {shortage}"))
                # the autoscaler drops a request when its group is released, but keeps this one
                bundles, labels = bundles_and_labels(roles)
                request_resources(bundles=bundles, bundle_label_selectors=labels)
                requested = True
            time.sleep(random.uniform(0.5, 1.5) * pause)
            pause = min(2 * pause, PLACEMENT_ATTEMPT_S)
    finally:
        if requested:
            request_resources(bundles=[])


def _create_groups(roles: Mapping[str, RoleConfig]) -> Gang:
    groups: dict[str, PlacementGroup] = {}
    owner = ray.get_runtime_context().get_actor_id() or "driver"
    suffix = uuid.uuid4().hex[:8]  # Ray requires unique names
    for name, config in roles.items():
        if config.share_with is None:
            groups[name] = placement_group(
                [worker_bundle(config)] * config.num_workers,
                strategy=config.strategy,
                name=f"medgpt-{name}-{owner}-{suffix}",
                bundle_label_selector=[config.labels] * config.num_workers,
            )
    shared = {n: groups[c.share_with] for n, c in roles.items() if c.share_with is not None}
    return Gang(groups | shared)


def release_orphaned_groups(is_orphaned: Callable[[str], bool]) -> set[str]:
    """Remove groups of actors for whose id `is_orphaned`; Ray keeps those of dead actors.

    Returns the ids of the actors whose groups stay.
    """
    remaining: set[str] = set()
    for key, row in placement_group_table().items():
        match = ACTOR_GROUP_NAME.fullmatch(row["name"])
        if match is None or row["state"] == "REMOVED":
            continue
        if is_orphaned(match[1]):
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(key))))
        else:
            remaining.add(match[1])
    return remaining


def draining_nodes() -> dict[str, float]:
    """Return the seconds left (inf if unknown) of each node that Ray drains, by node id."""
    now_ms = time.time() * 1000
    draining = ray_state.get_draining_nodes()
    return {
        node: (deadline_ms - now_ms) / 1000 if deadline_ms else math.inf
        for node, deadline_ms in draining.items()
    }


def wait_for_lost_nodes(timeout_s: float) -> None:
    """Wait until every node that Ray counts as alive answers, or `timeout_s` have passed.

    Ray waits for several missed heartbeats and starts new workers on a lost node until then.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if all(_is_reachable(node) for node in ray.nodes() if node["Alive"]):
            return
        time.sleep(CONNECT_TIMEOUT_S)


def _is_reachable(node: Mapping[str, Any]) -> bool:
    try:
        address = (node["NodeManagerAddress"], node["NodeManagerPort"])
        socket.create_connection(address, timeout=CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def is_actor_dead(actor_id: str) -> bool:
    """Return whether the actor is dead or unknown to Ray."""
    return ray_state.actor_table(actor_id).get("State", "DEAD") == "DEAD"


def _unplaced_roles(gang: Gang, seconds: float) -> list[str]:
    """Return the roles whose groups are not placed after `seconds`."""
    ready_refs = {name: group.ready() for name, group in gang.groups.items()}
    placed, _ = ray.wait(list(ready_refs.values()), num_returns=len(ready_refs), timeout=seconds)
    return [name for name, ref in ready_refs.items() if ref not in placed]


def bundles_and_labels(
    roles: Mapping[str, RoleConfig],
) -> tuple[list[dict[str, float]], list[dict[str, str]]]:
    """Return the bundle of every worker and the node labels it requires."""
    hosts = [config for config in roles.values() if config.share_with is None]
    workers = [config for config in hosts for _ in range(config.num_workers)]
    return [worker_bundle(c) for c in workers], [dict(c.labels) for c in workers]


def _describe_free_resources() -> str:
    free, total = ray.available_resources(), ray.cluster_resources()
    parts = [f"{free.get(n, 0):g} of {total[n]:g} {n}" for n in ("CPU", "GPU") if n in total]
    return f"free now {' and '.join(parts) or 'nothing'}"

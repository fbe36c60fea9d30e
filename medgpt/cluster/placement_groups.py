"""Room for pools: a placement group for each, all of them or none."""

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

from medgpt.cluster.capacity import bundle
from medgpt.cluster.ray_internals import ray_state
from medgpt.config.base import ConfigError
from medgpt.config.pools import RoleConfig

TRY_S = 20.0  # that part of a gang may be held while the rest is not there
REACH_S = 1.0  # in which a node answers
MADE_BY_ACTOR = re.compile(r"medgpt-\w+-([0-9a-f]+)-\w+")  # names of groups
PAUSE_S = 2.0  # on average, before the next try; doubles up to TRY_S


@dataclass(frozen=True)
class Gang:
    """Placement groups by role; a role that shares has those of its host."""

    groups: Mapping[str, PlacementGroup]

    def release(self) -> None:
        for group in {group.id: group for group in self.groups.values()}.values():
            remove_placement_group(group)

    def roles_on(self, nodes: Container[str]) -> set[str]:
        """Those with a bundle on one of these nodes, by their ids in hexadecimal."""
        return {
            role
            for role, group in self.groups.items()
            if any(
                node in nodes
                for node in placement_group_table(group)["bundles_to_node_id"].values()
            )
        }


def acquire(
    roles: Mapping[str, RoleConfig],
    *,
    wait_s: float,
    say: Callable[[str], None],
    try_s: float = TRY_S,
) -> Gang:
    """Place all pools, or none of them.

    What is placed in part is released after `try_s` and tried again after a random pause, so that
    two jobs that each hold half of a cluster do not wait for each other for ever.

    Raises:
        ConfigError: a pool had no room within `wait_s`.
    """
    deadline = time.monotonic() + wait_s
    pause, asked = min(PAUSE_S, try_s), False
    try:
        while True:
            gang = _request(roles)
            missing = _missing(gang, min(try_s, max(0.0, deadline - time.monotonic())))
            if not missing:
                return gang
            state = f"{', '.join(missing)}, {_free()}"
            gang.release()
            if time.monotonic() + pause > deadline:
                raise ConfigError(
                    f"cluster.wait_s={wait_s:g}: no room for all pools in this time, last not for "
                    f"{state}; use fewer or smaller workers in [pools], or a larger cluster"
                )
            if not asked:
                say(f"waiting up to {wait_s:g} s for room for all pools: none for {state}")
                # an autoscaler forgets what is released here, but not this
                bundles, labels = asked_for(roles)
                request_resources(bundles=bundles, bundle_label_selectors=labels)
                asked = True
            time.sleep(random.uniform(0.5, 1.5) * pause)
            pause = min(2 * pause, TRY_S)
    finally:
        if asked:
            request_resources(bundles=[])


def _request(roles: Mapping[str, RoleConfig]) -> Gang:
    groups: dict[str, PlacementGroup] = {}
    maker = ray.get_runtime_context().get_actor_id() or "driver"
    unique = uuid.uuid4().hex[:8]  # Ray wants each name once
    for name, config in roles.items():
        if config.share_with is None:
            groups[name] = placement_group(
                [bundle(config)] * config.num_workers,
                strategy=config.strategy,
                name=f"medgpt-{name}-{maker}-{unique}",
                bundle_label_selector=[config.labels] * config.num_workers,
            )
    shared = {n: groups[c.share_with] for n, c in roles.items() if c.share_with is not None}
    return Gang(groups | shared)


def release_of(is_orphaned: Callable[[str], bool]) -> None:
    """Remove the groups that certain actors, by their id, have made and cannot release any more.

    Ray would keep those of a dead actor until the job ends.
    """
    for key, row in placement_group_table().items():
        found = MADE_BY_ACTOR.fullmatch(row["name"])
        if found and row["state"] != "REMOVED" and is_orphaned(found[1]):
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(key))))


def ending_nodes() -> dict[str, float]:
    """Nodes whose end Ray has announced (it drains them), by id the seconds that are left."""
    now_ms = time.time() * 1000
    draining = ray_state.get_draining_nodes()
    return {
        node: (deadline_ms - now_ms) / 1000 if deadline_ms else math.inf
        for node, deadline_ms in draining.items()
    }


def await_lost_nodes(timeout_s: float) -> None:
    """Return when Ray knows of every node that cannot be reached that it is lost.

    Ray counts missed heartbeats first, and would start new workers there until then.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if all(_is_reached(node) for node in ray.nodes() if node["Alive"]):
            return
        time.sleep(REACH_S)


def _is_reached(node: Mapping[str, Any]) -> bool:
    try:
        address = (node["NodeManagerAddress"], node["NodeManagerPort"])
        socket.create_connection(address, timeout=REACH_S).close()
    except OSError:
        return False
    return True


def is_dead(actor_id: str) -> bool:
    """Whether Ray knows that it is, or no longer knows it."""
    return ray_state.actor_table(actor_id).get("State", "DEAD") == "DEAD"


def _missing(gang: Gang, seconds: float) -> list[str]:
    """Roles whose groups are not placed after so many seconds."""
    ready = {name: group.ready() for name, group in gang.groups.items()}
    placed, _ = ray.wait(list(ready.values()), num_returns=len(ready), timeout=seconds)
    return [name for name, ref in ready.items() if ref not in placed]


def asked_for(
    roles: Mapping[str, RoleConfig],
) -> tuple[list[dict[str, float]], list[dict[str, str]]]:
    """Bundles of all workers, and the labels of the node that each wants."""
    own = [config for config in roles.values() if config.share_with is None]
    workers = [config for config in own for _ in range(config.num_workers)]
    return [bundle(config) for config in workers], [dict(config.labels) for config in workers]


def _free() -> str:
    free, whole = ray.available_resources(), ray.cluster_resources()
    parts = [f"{free.get(n, 0):g} of {whole[n]:g} {n}" for n in ("CPU", "GPU") if n in whole]
    return f"free now {' and '.join(parts) or 'nothing'}"

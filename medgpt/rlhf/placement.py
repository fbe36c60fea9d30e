"""Room for pools: a placement group for each, all of them or none."""

import random
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from medgpt.config import ConfigError, RoleConfig

TRY_S = 20.0  # that part of a gang may be held while the rest is not there
PAUSE_S = 2.0  # on average, before the next try; doubles up to TRY_S


@dataclass(frozen=True)
class Gang:
    """Placement groups by role; a role that shares has those of its host."""

    groups: Mapping[str, PlacementGroup]

    def release(self) -> None:
        for group in {group.id: group for group in self.groups.values()}.values():
            remove_placement_group(group)


def bundles(config: RoleConfig) -> list[dict[str, float]]:
    """What each worker of a pool reserves."""
    one = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker, **config.resources}
    return [{name: amount for name, amount in one.items() if amount}] * config.num_workers


def acquire(roles: Mapping[str, RoleConfig], *, wait_s: float, say: Callable[[str], None]) -> Gang:
    """Place all pools, or none of them.

    What is placed in part is released and tried again after a random pause, so that two jobs that
    each hold half of a cluster do not wait for each other for ever.

    Raises:
        ConfigError: a pool had no room within `wait_s`.
    """
    deadline = time.monotonic() + wait_s
    pause, said = PAUSE_S, False
    while True:
        gang = _request(roles)
        missing = _missing(gang, min(TRY_S, max(0.0, deadline - time.monotonic())))
        if not missing:
            return gang
        gang.release()
        names = ", ".join(missing)
        if time.monotonic() + pause > deadline:
            raise ConfigError(
                f"cluster.wait_s={wait_s:g}: no room for all pools in this time, last not for "
                f"{names}; use fewer or smaller workers in [pools], or a larger cluster"
            )
        if not said:
            say(f"waiting up to {wait_s:g} s for room for all pools, now none for {names}")
            said = True
        time.sleep(random.uniform(0.5, 1.5) * pause)
        pause = min(2 * pause, TRY_S)


def _request(roles: Mapping[str, RoleConfig]) -> Gang:
    groups: dict[str, PlacementGroup] = {}
    job = uuid.uuid4().hex[:8]  # Ray wants each name once
    for name, config in roles.items():
        if config.share_with is None:
            groups[name] = placement_group(
                bundles(config),
                strategy=config.strategy,
                name=f"medgpt-{name}-{job}",
                bundle_label_selector=[config.labels] * config.num_workers,
            )
    shared = {n: groups[c.share_with] for n, c in roles.items() if c.share_with is not None}
    return Gang(groups | shared)


def _missing(gang: Gang, seconds: float) -> list[str]:
    """Roles whose groups are not placed after so many seconds."""
    deadline = time.monotonic() + seconds
    return [
        name
        for name, group in gang.groups.items()
        if not group.wait(max(0.0, deadline - time.monotonic()))
    ]

"""Gangs are placed completely or not at all, and jobs that need all resources take turns."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray

from medgpt.cluster.placement_groups import (
    Gang,
    acquire_gang,
    bundles_and_labels,
    is_actor_dead,
    release_orphaned_groups,
)
from medgpt.config.base import ConfigError
from medgpt.config.pools import PoolsConfig, RoleConfig
from medgpt.rlhf.pools.pool import Pool
from medgpt.rlhf.pools.pools import Pools
from tests.rlhf.roles import Adder

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
HALF = RoleConfig(cpus_per_worker=2)  # of the session's cluster
WHOLE = {"actor": HALF, "critic": HALF}


def ignore_line(_: str) -> None:
    """Print nothing."""


def acquire_quickly(roles: dict[str, RoleConfig], wait_s: float = 60) -> Gang:
    return acquire_gang(roles, wait_s=wait_s, say=ignore_line, attempt_s=1)


def test_a_partly_placed_gang_releases_its_groups() -> None:
    first = acquire_quickly({"reward": HALF})
    with ThreadPoolExecutor() as thread:
        waiting = thread.submit(acquire_quickly, WHOLE)
        time.sleep(0.5)  # it holds the other half
        second = acquire_quickly({"rollout": HALF}, wait_s=30)
        assert not waiting.done()
        first.release()
        second.release()
        waiting.result(60).release()


def test_two_jobs_that_each_want_the_whole_cluster_take_turns() -> None:
    running = threading.Lock()

    def job(_: int) -> None:
        for _ in range(2):
            gang = acquire_quickly(WHOLE, wait_s=100)
            assert running.acquire(blocking=False), "both have the whole cluster"
            running.release()
            gang.release()

    with ThreadPoolExecutor() as threads:
        list(threads.map(job, range(2)))


def test_the_wait_for_a_gang_is_announced_and_bounded() -> None:
    lines: list[str] = []
    taken = acquire_quickly({"reward": HALF})
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"wait_s=2: no resources .*(actor, )?critic, free now"):
        acquire_gang(WHOLE, wait_s=2, say=lines.append, attempt_s=0.5)
    assert time.monotonic() - began < 10
    taken.release()
    assert len(lines) == 1
    assert "waiting up to 2 s for resources for all pools" in lines[0]


def test_a_pool_larger_than_the_cluster_is_refused_at_once() -> None:
    config = PoolsConfig()
    pools = Pools(
        [Pool("critic", RoleConfig(num_workers=5), Adder)], config, wait_s=60, say=ignore_line
    )
    with pytest.raises(ConfigError, match=r"pools.critic \(5 x \(1 CPU\)\) can never be placed"):
        pools.start()


class GangOwner:
    def acquire(self) -> None:
        acquire_quickly({"reward": HALF})


def kill_and_wait(maker: Any) -> None:
    """Kill an actor and wait until Ray knows it."""
    assert not is_actor_dead(maker._actor_id.hex())
    ray.kill(maker)
    deadline = time.monotonic() + 30
    while not is_actor_dead(maker._actor_id.hex()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def assert_no_room(role: str) -> None:
    with pytest.raises(ConfigError, match="no resources"):
        acquire_gang({role: HALF}, wait_s=1, say=ignore_line, attempt_s=0.5)


def test_only_groups_of_dead_actors_are_released() -> None:
    living, dying = (ray.remote(GangOwner).options(num_cpus=0).remote() for _ in range(2))
    ray.get([living.acquire.remote(), dying.acquire.remote()])
    kill_and_wait(dying)
    assert_no_room("actor")  # Ray keeps the group of a dead actor
    release_orphaned_groups(is_actor_dead)
    gang = acquire_quickly({"actor": HALF}, wait_s=20)
    release_orphaned_groups(is_actor_dead)
    assert_no_room("critic")
    gang.release()
    kill_and_wait(living)
    release_orphaned_groups(is_actor_dead)
    acquire_quickly(WHOLE, wait_s=20).release()


def test_a_role_with_share_with_uses_its_hosts_bundles() -> None:
    guest = HALF.model_copy(update={"share_with": "actor"})
    gang = acquire_quickly({"actor": HALF, "reference": guest})
    assert gang.groups["actor"].id == gang.groups["reference"].id
    assert ray.available_resources().get("CPU", 0) <= 2
    gang.release()


def test_the_request_to_the_autoscaler_includes_labels() -> None:
    actor = RoleConfig(num_workers=2, gpus_per_worker=1, labels={"zone": "a"})
    roles = {"actor": actor, "critic": RoleConfig(share_with="actor"), "reward": HALF}
    bundles, labels = bundles_and_labels(roles)
    assert bundles == [{"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 1}, {"CPU": 2}]
    assert labels == [{"zone": "a"}, {"zone": "a"}, {}]

"""Gangs are placed whole or not at all, and jobs that want more than there is take turns."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray

from medgpt.cluster.placement_groups import Gang, acquire, asked_for, is_dead, release_of
from medgpt.config.base import ConfigError
from medgpt.config.pools import PoolsConfig, RoleConfig
from medgpt.rlhf.pools.pool import Pool
from medgpt.rlhf.pools.pools import Pools
from tests.rlhf.roles import Adder

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
HALF = RoleConfig(cpus_per_worker=2)  # of the session's cluster
WHOLE = {"actor": HALF, "critic": HALF}


def silent(_: str) -> None:
    """Says nothing."""


def quickly(roles: dict[str, RoleConfig], wait_s: float = 60) -> Gang:
    return acquire(roles, wait_s=wait_s, say=silent, try_s=1)


def test_half_a_gang_does_not_keep_what_it_has() -> None:
    first = quickly({"reward": HALF})
    with ThreadPoolExecutor() as thread:
        waiting = thread.submit(quickly, WHOLE)
        time.sleep(0.5)  # it holds the other half
        second = quickly({"rollout": HALF}, wait_s=30)
        assert not waiting.done()
        first.release()
        second.release()
        waiting.result(60).release()


def test_two_jobs_that_each_want_the_whole_cluster_take_turns() -> None:
    running = threading.Lock()

    def job(_: int) -> None:
        for _ in range(2):
            gang = quickly(WHOLE, wait_s=100)
            assert running.acquire(blocking=False), "both have the whole cluster"
            running.release()
            gang.release()

    with ThreadPoolExecutor() as threads:
        list(threads.map(job, range(2)))


def test_the_wait_is_told_and_bounded() -> None:
    said: list[str] = []
    taken = quickly({"reward": HALF})
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"wait_s=2: no room .* for (actor, )?critic, free now"):
        acquire(WHOLE, wait_s=2, say=said.append, try_s=0.5)
    assert time.monotonic() - began < 10
    taken.release()
    assert len(said) == 1
    assert "waiting up to 2 s for room for all pools" in said[0]


def test_a_pool_larger_than_the_cluster_is_refused_at_once() -> None:
    config = PoolsConfig()
    pools = Pools([Pool("critic", RoleConfig(num_workers=5), Adder)], config, wait_s=60, say=silent)
    with pytest.raises(ConfigError, match=r"pools.critic \(5 x \(1 CPU\)\) can never be placed"):
        pools.start()


class Maker:
    def take(self) -> None:
        quickly({"reward": HALF})


def kill(maker: Any) -> None:
    """Returns when Ray knows that it is dead."""
    assert not is_dead(maker._actor_id.hex())
    ray.kill(maker)
    deadline = time.monotonic() + 30
    while not is_dead(maker._actor_id.hex()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def assert_refused(role: str) -> None:
    with pytest.raises(ConfigError, match="no room"):
        acquire({role: HALF}, wait_s=1, say=silent, try_s=0.5)


def test_what_a_dead_actor_held_is_released_and_nothing_else() -> None:
    living, dying = (ray.remote(Maker).options(num_cpus=0).remote() for _ in range(2))
    ray.get([living.take.remote(), dying.take.remote()])
    kill(dying)
    assert_refused("actor")  # Ray itself keeps it
    release_of(is_dead)
    mine = quickly({"actor": HALF}, wait_s=20)
    release_of(is_dead)
    assert_refused("critic")
    mine.release()
    kill(living)
    release_of(is_dead)
    quickly(WHOLE, wait_s=20).release()


def test_roles_share_bundles_when_told_to() -> None:
    guest = HALF.model_copy(update={"share_with": "actor"})
    gang = quickly({"actor": HALF, "reference": guest})
    assert gang.groups["actor"].id == gang.groups["reference"].id
    assert ray.available_resources().get("CPU", 0) <= 2
    gang.release()


def test_an_autoscaler_is_asked_for_nodes_with_the_labels_that_the_workers_want() -> None:
    actor = RoleConfig(num_workers=2, gpus_per_worker=1, labels={"zone": "a"})
    roles = {"actor": actor, "critic": RoleConfig(share_with="actor"), "reward": HALF}
    bundles, labels = asked_for(roles)
    assert bundles == [{"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 1}, {"CPU": 2}]
    assert labels == [{"zone": "a"}, {"zone": "a"}, {}]

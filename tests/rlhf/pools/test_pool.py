"""Pools: refs pass between pools, errors reach the driver, dead workers are restarted."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import ray
from ray.exceptions import ObjectLostError, RayTaskError

from medgpt.config.base import ConfigError
from medgpt.config.pools import PoolsConfig, RoleConfig
from medgpt.rlhf.pools.pool import Pool
from medgpt.rlhf.pools.pools import DataLost, PoolDied, Pools
from tests.rlhf.roles import (
    Adder,
    DeviceGuest,
    DiesWhenUnpickled,
    kill_first_caller,
    kill_self,
    raise_config_error,
)

pytestmark = pytest.mark.ray
SMALL = RoleConfig(num_workers=2, cpus_per_worker=0.5)
CONFIG = PoolsConfig(call_timeout_s=60, join_timeout_s=120)


def started(*pools: Pool[Adder], config: PoolsConfig = CONFIG) -> Pools:
    together = Pools(pools, config, wait_s=60, say=print)
    together.start()
    return together


@pytest.fixture(scope="module")
def pools(ray_session: None) -> Iterator[Pools]:
    together = started(Pool("actor", SMALL, Adder), Pool("reward", SMALL, Adder, independent=True))
    yield together
    together.close()


def test_a_pool_is_one_process_group_and_refs_chain_between_pools(pools: Pools) -> None:
    actor, reward = pools.pools["actor"], pools.pools["reward"]
    first = actor.call(Adder.total, 10)
    second = reward.call(Adder.total, first[0])
    assert pools.get([*first, *second], "adding") == [21, 21, 43, 43]
    facts = pools.get(actor.call(Adder.facts) + reward.call(Adder.facts), "facts")
    assert [fact["rank"] for fact in facts] == [0, 1, 0, 1]
    assert {(fact["ranks"], fact["threads"]) for fact in facts} == {(2, 1)}
    assert len({fact["pid"] for fact in facts}) == 4


def test_config_errors_of_roles_reach_the_driver_as_such(pools: Pools) -> None:
    actor = pools.pools["actor"]
    with pytest.raises(ConfigError, match="has no head"):
        pools.get(actor.call(Adder.refuse), "refusing")
    refused = actor.call(Adder.refuse)
    with pytest.raises(ConfigError, match="has no head"):  # also when it comes as an argument
        pools.get(pools.pools["reward"].call(Adder.own, refused[0]), "refusing")
    with pytest.raises(RayTaskError, match="a bug") as caught:
        pools.get(actor.call(Adder.fail)[1:], "failing")
    assert caught.value.cause.__notes__ == ["in fail of the actor pool, rank 1"]


def test_a_call_timeout_names_the_workers(pools: Pools) -> None:
    refs = pools.pools["actor"].call(Adder.sleep, 3.0)
    with pytest.raises(PoolDied, match="actor pool: rank 0, 1 did not answer within 1 s of sleep"):
        pools.get(refs, "sleep", timeout_s=1)
    pools.get(refs, "sleep")


def test_usage_is_that_of_the_latest_call(pools: Pools) -> None:
    actor = pools.pools["actor"]
    sleeping = actor.call(Adder.sleep, 0.5)
    usage = actor.usage()
    actor.call(Adder.own, 1)
    pools.wait(sleeping, "sleep")
    used = pools.get(usage, "usage")
    assert all(0.5 <= one.call_s < 5 and 0.01 < one.rss_gb < 10 for one in used)


@pytest.mark.parametrize("then_sum", [True, False], ids=["in a collective", "alone"])
def test_the_death_of_a_rank_ends_the_wait_and_the_pool_is_rebuilt(
    pools: Pools, then_sum: bool
) -> None:
    actor, reward = pools.pools["actor"], pools.pools["reward"]
    before = pools.get(actor.call(Adder.facts), "facts")
    died = actor.call(Adder.die, 1, then_sum)
    with pytest.raises(PoolDied, match="actor pool: rank 1 died") as caught:
        pools.get(reward.call(Adder.own, died[1]) + died, "dying")
    pools.rebuild(caught.value)
    after = pools.get(actor.call(Adder.facts), "facts")
    assert not {fact["pid"] for fact in before} & {fact["pid"] for fact in after}
    assert pools.get(actor.call(Adder.total, 1), "adding") == [3, 3]


def test_an_independent_pool_restarts_only_the_dead_rank(pools: Pools) -> None:
    reward = pools.pools["reward"]
    before = pools.get(reward.call(Adder.own, 0), "calls")
    with pytest.raises(PoolDied, match="reward pool: rank 0 died") as caught:
        pools.get(reward.call(Adder.die, 0, True), "dying")
    pools.rebuild(caught.value)
    after = pools.get(reward.call(Adder.own, 0), "calls")
    assert after[0][2] != before[0][2]
    assert after[1][1:] == (before[1][1] + 2, before[1][2])  # the same role, with its memory
    assert pools.get(reward.call(Adder.total, 1), "adding") == [3, 3]


def test_a_death_while_joining_restarts_all_ranks(ray_session: None, tmp_path: Path) -> None:
    marker = tmp_path / "dies"
    pool = Pool("reward", SMALL, DiesWhenUnpickled(marker), independent=True)
    together = started(pool, config=PoolsConfig(call_timeout_s=600))
    with pytest.raises(PoolDied) as caught:
        together.get(pool.call(Adder.die, 1, True), "dying")
    marker.touch()
    with pytest.raises(PoolDied, match="reward pool: rank 1 died") as again:
        together.rebuild(caught.value)  # rank 0 waits for it in the new group
    began = time.monotonic()
    together.rebuild(again.value)
    assert together.get(pool.call(Adder.total, 1), "adding") == [3, 3]
    assert time.monotonic() - began < 60
    together.close()


def read_on(ref: ray.ObjectRef) -> None:
    while len(ray.get(ref)):
        time.sleep(0.1)


@pytest.mark.parametrize("and_dies", [False, True], ids=["alone", "with a worker"])
def test_lost_data_raises_data_lost_or_names_the_dead_pool(pools: Pools, and_dies: bool) -> None:
    actor, reward = pools.pools["actor"], pools.pools["reward"]
    (held,), *_ = pools.get(reward.call(Adder.hold, 10**6), "holding")
    with pytest.raises(PoolDied) as caught:
        pools.get(reward.call(Adder.die, 0, True)[:1], "dying")
    with pytest.raises(ObjectLostError):  # it takes Ray a moment to notice that the owner is gone
        read_on(held)
    if not and_dies:
        assert pools.rebuild(caught.value) == {"reward"}
    expected = (PoolDied, "reward pool: rank 0 died") if and_dies else (DataLost, "is lost")
    with pytest.raises(expected[0], match=expected[1]):
        pools.get(actor.call(Adder.size, held), "reading")
    with pytest.raises(expected[0], match=expected[1]):
        pools.get([held], "fetching")
    if and_dies:
        pools.rebuild(caught.value)
    assert pools.get(actor.call(Adder.total, 1), "adding") == [3, 3]


def test_pools_that_died_together_are_rebuilt_together(
    pools: Pools, capsys: pytest.CaptureFixture[str]
) -> None:
    actor, reward = pools.pools["actor"], pools.pools["reward"]
    deaths = [*actor.call(Adder.die, 0, True)[:1], *reward.call(Adder.die, 1, True)[1:]]
    with pytest.raises(PoolDied) as caught:
        pools.get(deaths, "dying")
    ray.wait(deaths, num_returns=2)
    assert pools.rebuild(caught.value) == {"actor", "reward"}
    assert "died, too; the pool is rebuilt" in capsys.readouterr().out  # the other is named by get
    assert pools.get(actor.call(Adder.total, 1), "adding") == [3, 3]
    assert pools.get(reward.call(Adder.total, 1), "adding") == [3, 3]


def test_a_config_error_while_building_a_role_ends_the_start(ray_session: None) -> None:
    together = Pools([Pool("reward", SMALL, raise_config_error)], CONFIG, wait_s=60, say=print)
    with pytest.raises(ConfigError, match="this machine has none"):
        together.start()
    together.close()


def test_a_worker_that_dies_while_it_starts_does_not_end_the_run(
    ray_session: None, tmp_path: Path
) -> None:
    said: list[str] = []
    pool = Pool("reward", SMALL, partial(kill_first_caller, tmp_path / "died"))
    together = Pools([pool], CONFIG, wait_s=60, say=said.append)
    together.start()
    assert together.get(pool.call(Adder.total, 1), "adding") == [3, 3]
    together.close()
    assert len(said) == 1
    assert "died before it was ready; starting all pools again" in said[0]


def test_a_worker_that_never_starts_ends_the_run(ray_session: None, tmp_path: Path) -> None:
    together = Pools([Pool("reward", SMALL, kill_self)], CONFIG, wait_s=60, say=silent)
    with pytest.raises(PoolDied, match="reward pool: rank"):
        together.start()
    assert not together.pools["reward"].workers


def silent(_: str) -> None:
    """Discard messages."""


def test_colocated_roles_take_turns_and_leave_the_device(pools: Pools) -> None:
    host = SMALL.model_copy(update={"offload": True})
    guest = host.model_copy(update={"share_with": "actor"})
    actor, critic = Pool("actor", host, DeviceGuest), Pool("critic", guest, DeviceGuest)
    together = Pools([actor, critic], CONFIG, wait_s=60, say=print)
    together.start()
    assert together._gang is not None
    groups = together._gang.groups
    assert groups["actor"].id == groups["critic"].id
    assert groups["actor"].bundle_specs == [{"CPU": 0.5}] * 2  # for four workers
    try:
        refs = [
            ref
            for _ in range(2)
            for pool in (actor, critic)
            for ref in pool.call(DeviceGuest.occupy, 0.2)
        ]
        spans = together.get(refs, "taking turns")
    finally:
        together.close()
    assert all(resident for resident, _, _ in spans)
    for earlier, later in zip(spans[:-2], spans[2:], strict=True):
        assert earlier[2] <= later[1] + 0.01

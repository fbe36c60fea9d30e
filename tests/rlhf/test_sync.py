"""Weights arrive whole, under their version, or an error names the worker that is missing."""

import os
import signal
from collections.abc import Iterator
from functools import partial

import pytest

from medgpt.config import PoolsConfig, RoleConfig, SyncConfig
from medgpt.rlhf.pool import Pool, PoolDied, Pools
from medgpt.rlhf.sync import StaleWeights, WeightSync
from tests.rlhf.roles import Holder

pytestmark = pytest.mark.ray
SMALL = RoleConfig(num_workers=2, cpus_per_worker=0.5)
QUICK = SyncConfig(transport="gloo", bucket_mb=1, timeout_s=3)


@pytest.fixture(scope="module")
def pools(ray_session: None) -> Iterator[Pools]:
    actor = Pool("actor", SMALL, partial(Holder, 1))
    rollout = Pool("rollout", SMALL, partial(Holder, 2), independent=True)
    together = Pools([actor, rollout], PoolsConfig(), wait_s=60, say=print)
    together.start()
    yield together
    together.close()


def new_sync(pools: Pools, config: SyncConfig = QUICK) -> WeightSync:
    return WeightSync(pools.pools["actor"], pools.pools["rollout"], pools, config)


def check(pools: Pools, version: int) -> None:
    """All rollout workers hold the actor's weights."""
    actor, rollout = pools.pools["actor"], pools.pools["rollout"]
    sent, *_, first, second = pools.get(actor.call(Holder.sums) + rollout.call(Holder.sums), "sums")
    assert first == second == (version, sent[1])


@pytest.mark.parametrize("transport", ["gloo", "object_store"])
def test_weights_arrive_again_and_again(pools: Pools, transport: str) -> None:
    sync = new_sync(pools, SyncConfig(transport=transport, bucket_mb=1, timeout_s=30))
    for version in (4, 5):
        pools.get(pools.pools["actor"].call(Holder.train), "training")
        metrics = sync.run(version)
        check(pools, version)
        assert metrics["sync/gb"] == pytest.approx(700 * 512 * 4 / 2**30, rel=0.01)
        assert metrics["time/sync_s"] > 0
    assert sync.version == 5
    sync.check([5, 5], 5)
    with pytest.raises(StaleWeights, match=r"rollout rank 1 has version 4 .*, not version 5"):
        sync.check([5, 4], 5)


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL], ids=["stopped", "killed"])
def test_a_lost_rollout_worker_is_named_and_replaced(pools: Pools, how: signal.Signals) -> None:
    sync = new_sync(pools)
    sync.run(1)
    pids = pools.get(pools.pools["rollout"].call(Holder.pid), "pids")
    os.kill(pids[1], how)
    with pytest.raises(PoolDied, match=r"rollout pool: rank 1 d") as caught:
        sync.run(2)
    assert sync.version == -1
    pools.rebuild(caught.value)
    assert pools.get(pools.pools["rollout"].call(Holder.pid), "pids")[0] == pids[0]
    sync.run(2)
    check(pools, 2)

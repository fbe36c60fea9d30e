"""Weights arrive complete, under their version, or an error names the failing worker."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from medgpt.config.pools import PoolsConfig, RoleConfig, SyncConfig
from medgpt.rlhf.pools.pool import Pool
from medgpt.rlhf.pools.pools import PoolDied, Pools
from medgpt.rlhf.weight_sync import process_group
from medgpt.rlhf.weight_sync.buckets import (
    Entry,
    Header,
    SyncError,
    WeightsCorrupted,
    WeightsRejected,
    pack_buckets,
    unpack_bucket,
)
from medgpt.rlhf.weight_sync.sync import WeightSync
from tests.rlhf.roles import (
    WeightHolder,
    corrupting_header,
    corrupting_unpack,
    kill_process,
    pack_late,
    raise_key_error,
    stop_process,
    unreachable,
)

pytestmark = pytest.mark.ray
SMALL = RoleConfig(num_workers=2, cpus_per_worker=0.5)
QUICK = SyncConfig(transport="gloo", bucket_mb=1, timeout_s=3)


@pytest.fixture(scope="module")
def pools(ray_session: None) -> Iterator[Pools]:
    actor = Pool("actor", SMALL, partial(WeightHolder, 1))
    rollout = Pool("rollout", SMALL, partial(WeightHolder, 2), independent=True)
    together = Pools([actor, rollout], PoolsConfig(), wait_s=60, say=print)
    together.start()
    yield together
    together.close()


def new_sync(pools: Pools, config: SyncConfig = QUICK) -> WeightSync:
    return WeightSync(pools.pools["actor"], pools.pools["rollout"], pools, config)


def tamper(pools: Pools, rank: int, name: str, fault: Callable[..., Any]) -> None:
    pools.get(pools.pools["rollout"].call(WeightHolder.tamper, rank, name, fault), "tampering")


def check(pools: Pools, version: int) -> None:
    """All rollout workers hold the actor's weights."""
    actor, rollout = pools.pools["actor"], pools.pools["rollout"]
    sent, *_, first, second = pools.get(
        actor.call(WeightHolder.sums) + rollout.call(WeightHolder.sums), "sums"
    )
    assert first == second == (version, sent[1])


@pytest.mark.parametrize("transport", ["gloo", "object_store"])
def test_every_sync_delivers_the_actors_weights(pools: Pools, transport: str) -> None:
    sync = new_sync(pools, SyncConfig(transport=transport, bucket_mb=1, timeout_s=30))
    for version in (4, 5):
        pools.get(pools.pools["actor"].call(WeightHolder.train), "training")
        metrics = sync.run(version)
        check(pools, version)
        assert metrics["sync/gb"] == pytest.approx(700 * 512 * 4 / 2**30, rel=0.01)
        assert metrics["time/sync_s"] > 0
    assert sync.version == 5


@pytest.mark.parametrize("how", [stop_process, kill_process])
def test_a_rollout_worker_that_dies_during_sync_is_named_and_replaced(
    pools: Pools, how: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "medgpt.rlhf.weight_sync.sync.REPORT_MARGIN_S", 8
    )  # a stopped worker may take all of it
    sync = new_sync(pools)
    sync.run(1)
    pids = pools.get(pools.pools["rollout"].call(WeightHolder.pid), "pids")
    tamper(pools, 1, "unpack_bucket", how)
    with pytest.raises(PoolDied, match=r"rollout pool: rank 1 d") as caught:
        sync.run(2)
    assert sync.version == -1
    pools.rebuild(caught.value)
    assert pools.get(pools.pools["rollout"].call(WeightHolder.pid), "pids")[0] == pids[0]
    sync.run(2)
    check(pools, 2)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_peer_ends_the_sync_before_the_timeout(pools: Pools, rank: int) -> None:
    sync = new_sync(pools, SyncConfig(transport="gloo", bucket_mb=1, timeout_s=300))
    actor, rollout = pools.pools["actor"], pools.pools["rollout"]
    sync.run(1)
    pids = pools.get(rollout.call(WeightHolder.pid), "pids")
    pools.get(actor.call(WeightHolder.tamper, 0, "pack_buckets", pack_late), "tampering")
    tamper(pools, rank, "receive", kill_process)
    began = time.monotonic()
    with pytest.raises(PoolDied, match=rf"rollout pool: rank {rank} died") as caught:
        sync.run(2)
    pools.rebuild(caught.value)
    assert pools.get(rollout.call(WeightHolder.pid), "pids")[1 - rank] == pids[1 - rank]
    sync.run(2)
    check(pools, 2)
    assert time.monotonic() - began < 100
    pools.get(actor.call(WeightHolder.tamper, 0, "pack_buckets", pack_buckets), "repairing")


def test_a_worker_that_is_dead_or_busy_before_the_sync_is_named_and_not_its_peer(
    pools: Pools,
) -> None:
    sync, rollout = new_sync(pools), pools.pools["rollout"]
    pids = pools.get(rollout.call(WeightHolder.pid), "pids")
    rollout.call(WeightHolder.sleep, QUICK.timeout_s + 4)
    sync.run(1)
    check(pools, 1)
    assert pools.get(rollout.call(WeightHolder.pid), "pids") == pids
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(PoolDied, match=r"rollout pool: rank 0 died") as caught:
        sync.run(2)
    pools.rebuild(caught.value)
    sync.run(2)
    check(pools, 2)


def test_corrupted_weights_are_sent_again_and_no_worker_is_replaced(
    pools: Pools, capsys: pytest.CaptureFixture[str]
) -> None:
    sync, rollout = new_sync(pools), pools.pools["rollout"]
    pids = pools.get(rollout.call(WeightHolder.pid), "pids")
    tamper(pools, 1, "unpack_bucket", corrupting_unpack(1))
    sync.run(1)
    check(pools, 1)
    assert (
        "actor rank 0 to rollout rank 1: embed to embed arrived corrupted"
        in capsys.readouterr().out
    )

    tamper(pools, 1, "unpack_bucket", corrupting_unpack(2))
    with pytest.raises(WeightsCorrupted, match="version 2, actor rank 0 to rollout rank 1"):
        sync.run(2)
    sync.run(3)
    check(pools, 3)
    assert pools.get(rollout.call(WeightHolder.pid), "pids") == pids


@pytest.mark.parametrize("transport", ["gloo", "object_store"])
def test_a_worker_that_cannot_load_weights_is_named_and_not_replaced(
    pools: Pools, transport: str
) -> None:
    sync = new_sync(pools, SyncConfig(transport=transport, bucket_mb=1, timeout_s=3))
    rollout = pools.pools["rollout"]
    pids = pools.get(rollout.call(WeightHolder.pid), "pids")
    tamper(pools, 1, "unpack_bucket", raise_key_error)
    with pytest.raises(
        WeightsRejected, match=r"to rollout rank 1: embed to embed: loading failed with KeyError"
    ):
        sync.run(1)
    tamper(pools, 1, "unpack_bucket", unpack_bucket)
    sync.run(2)
    check(pools, 2)
    assert pools.get(rollout.call(WeightHolder.pid), "pids") == pids


def test_a_corrupted_header_costs_a_timeout_and_no_worker(pools: Pools) -> None:
    sync, rollout = new_sync(pools), pools.pools["rollout"]
    pids = pools.get(rollout.call(WeightHolder.pid), "pids")
    tamper(pools, 0, "Header", corrupting_header(2))
    with pytest.raises(WeightsCorrupted, match="to rollout rank 0: a header"):
        sync.run(1)
    sync.run(2)
    check(pools, 2)
    assert pools.get(rollout.call(WeightHolder.pid), "pids") == pids


def test_a_missing_bucket_names_its_sender(pools: Pools) -> None:
    slow = pools.pools["actor"].call(WeightHolder.sleep, 4.0)
    bucket = Header([Entry("embed", "float32", (1,), 0)], 4, 0), slow[0]
    refs = pools.pools["rollout"].call(process_group.load_buckets, [bucket], 4, 0.5)
    words = (
        "actor rank 0 by object store to rollout rank 1: embed to embed did not arrive within 0.5"
    )
    with pytest.raises(SyncError, match=f"version 4, {words}"):
        pools.get(refs[1:], "receiving")


def test_pools_without_a_process_group_try_again_after_a_rebuild(pools: Pools) -> None:
    sync = new_sync(pools, SyncConfig(bucket_mb=1, timeout_s=3))
    rollout = pools.pools["rollout"]
    tamper(pools, 1, "TCPStore", unreachable)
    sync.run(1)
    check(pools, 1)
    assert not all(pools.get(rollout.call(WeightHolder.is_connected), "links"))
    pools.rebuild(PoolDied("rollout", [1], "is exchanged"))
    sync.run(2)
    check(pools, 2)
    assert all(pools.get(rollout.call(WeightHolder.is_connected), "links"))

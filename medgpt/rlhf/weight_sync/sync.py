"""Weights from the actor to the rollout workers, by a process group or Ray's object store."""

import time
from typing import Any, NoReturn

import ray
from ray.exceptions import RayError, RayTaskError

from medgpt.config.pools import SyncConfig
from medgpt.rlhf.pools.pool import Pool
from medgpt.rlhf.pools.pools import PING_S, PoolDied, Pools
from medgpt.rlhf.weight_sync import process_group
from medgpt.rlhf.weight_sync.buckets import Changed, Refused, SyncError

MARGIN_S = 30  # in which workers tell of their own timeout, and name the peer


class WeightSync:
    """Brings a version of the actor's weights to all rollout workers.

    Their roles are a `process_group.Sender` and a `process_group.Receiver`.
    """

    def __init__(
        self, actor: Pool[Any], rollout: Pool[Any], pools: Pools, config: SyncConfig
    ) -> None:
        self.actor, self.rollout, self.pools, self.config = actor, rollout, pools, config
        self.version = process_group.UNSYNCED
        """What all rollout workers have."""
        self.attempts = 0
        self._linked: tuple[int, int] | None = None  # epochs of the pools
        self._apart: tuple[int, int] | None = None
        """Epochs of the pools that found no link to each other."""

    def run(self, version: int) -> dict[str, float]:
        """Send; metrics. What arrived changed is sent once more.

        Raises:
            PoolDied: a worker is gone or does not answer.
            SyncError: all answer, but the weights did not arrive or not as they were sent.
        """
        began = time.monotonic()
        self.version = process_group.UNSYNCED
        # who is busy with an earlier call would look lost to the others of the transfer
        earlier = [*self.actor.pings(), *self.rollout.pings()]
        self.pools.wait(earlier, "earlier work of actor and rollout")
        try:
            counts = self._transfer(version)
        except Changed as error:
            self.pools.say(f"{error}; sent once more")
            counts = self._transfer(version)
        assert len(set(counts)) == 1, counts  # each bucket has a checksum; this counts them
        self.version = version
        seconds = time.monotonic() - began
        return {"sync/gb": counts[0] / 2**30, "time/sync_s": seconds}

    def _transfer(self, version: int) -> list[int]:
        """Bytes, as each end has counted them."""
        calls: list[Any] = []
        try:
            calls, counted = self._begin(version)
            linked, self._linked = self._linked, None  # both ends leave a transfer that fails
            limit = self.config.timeout_s + MARGIN_S
            self.pools.wait(calls, f"weight sync of version {version}", timeout_s=limit)
            counts = self.pools.get(counted, "bytes of weight sync")
        except RayTaskError as error:
            self._explain(error, calls)
        self._linked = linked
        return counts

    def _begin(self, version: int) -> tuple[list[Any], list[Any]]:
        """Refs of all calls of a transfer, and of those among them that count bytes."""
        config = self.config
        if self._stored():
            shipped, *others = self.actor.call(process_group.ship, version, config.bucket_mb)
            received = self.rollout.call(process_group.unship, shipped, version, config.timeout_s)
            return [shipped, *others, *received], received
        sent, *others = self.actor.call(process_group.send, version)
        received = self.rollout.call(process_group.receive, version)
        return [sent, *others, *received], [sent, *received]

    def _stored(self) -> bool:
        """Whether to go through the object store; connects, if that is to be avoided. Pools that
        found no link try again when one of them was rebuilt."""
        if self.config.transport == "object_store" or self._takes_turns():
            return True
        epochs = (self.actor.epoch, self.rollout.epoch)
        if epochs not in (self._linked, self._apart):
            try:
                self._connect()
                self._linked = epochs
            except RayTaskError as error:
                if self.config.transport != "auto":
                    raise
                self._raise_dead()
                reason = str(error.cause).splitlines()[0]
                self.pools.say(f"weights go through the object store: no process group ({reason})")
                self._apart = epochs
        return self._linked != epochs

    def _takes_turns(self) -> bool:
        """On shared bundles one side never waits for the other."""
        return self.actor.turn is self.rollout.turn

    def _connect(self) -> None:
        self.attempts += 1
        config = self.config
        (meeting, *_) = self.actor.call(process_group.meet, config.timeout_s)
        common = {
            "size": 1 + len(self.rollout.workers),
            "backend": self._backend(),
            "config": config,
        }
        key = str(self.attempts)
        ends = self.actor.call(process_group.connect, meeting, key, rank=0, **common)
        ends += self.rollout.call(process_group.connect, meeting, key, rank=None, **common)
        self.pools.wait(ends, "linking actor and rollout", timeout_s=config.timeout_s + MARGIN_S)

    def _backend(self) -> str:
        if self.config.transport in ("nccl", "gloo"):
            return self.config.transport
        pools = (self.actor.config, self.rollout.config)
        gpus = all(pool.gpus_per_worker >= 1 for pool in pools)
        return "nccl" if gpus and not any(pool.share_with for pool in pools) else "gloo"

    def _explain(self, error: RayTaskError, calls: list[Any]) -> NoReturn:
        """Find out which side failed: who is dead, else who does not answer, else who told."""
        self._raise_dead()
        if not isinstance(error.cause, SyncError):
            raise error
        # the others hear of it soon, or not before their own time limit
        limit = self.config.timeout_s
        patience = limit + MARGIN_S if isinstance(error.cause, Changed) else min(limit, MARGIN_S)
        ended, late = ray.wait(calls, num_returns=len(calls), timeout=patience, fetch_local=False)
        for pool in (self.rollout, self.actor):
            if silent := [rank for ref in late if (rank := pool.rank_of(ref)) is not None]:
                raise PoolDied(pool.role, silent, f"does not answer: {error.cause}") from error
        # that a peer was lost may follow from what happened to the peer
        told = [cause for ref in ended if isinstance(cause := _cause(ref), SyncError)]
        raise min(told, key=lambda cause: not isinstance(cause, Changed | Refused)) from None

    def _raise_dead(self) -> None:
        for pool in (self.rollout, self.actor):
            if dead := pool.dead(PING_S):
                raise PoolDied(pool.role, dead, "died during weight sync")


def _cause(ref: Any) -> Exception | None:
    """Of the failure of a call that has ended."""
    try:
        ray.get(ref)
    except RayTaskError as error:
        return error.cause
    except RayError as error:
        return error
    return None

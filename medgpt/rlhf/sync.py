"""Weights from the actor to the rollout workers, by a process group or Ray's object store."""

import time
from typing import Any, NoReturn

from ray.exceptions import RayTaskError

from medgpt.config import SyncConfig
from medgpt.rlhf import link
from medgpt.rlhf.buckets import SyncError
from medgpt.rlhf.pool import PING_S, Pool, PoolDied, Pools

MARGIN_S = 30  # in which workers tell of their own timeout, and name the peer


class StaleWeights(RuntimeError):
    """A rollout worker's weights are not those that were asked for."""


class WeightSync:
    """Brings a version of the actor's weights to all rollout workers.

    Their roles are a `link.Sender` and a `link.Receiver`.
    """

    def __init__(
        self, actor: Pool[Any], rollout: Pool[Any], pools: Pools, config: SyncConfig
    ) -> None:
        self.actor, self.rollout, self.pools, self.config = actor, rollout, pools, config
        self.version = link.UNSYNCED
        """What all rollout workers have."""
        self.attempts = 0
        self._linked: tuple[int, int] | None = None  # epochs of the pools
        self._through_store = config.transport == "object_store"

    def run(self, version: int) -> dict[str, float]:
        """Send; metrics.

        Raises:
            PoolDied: a worker is gone or does not answer.
            SyncError: all answer, but the weights did not arrive or not as they were sent.
        """
        began = time.monotonic()
        self.version = link.UNSYNCED
        try:
            counts = self._through_ray(version) if self._stored() else self._broadcast(version)
        except RayTaskError as error:
            self._explain(error)
        except PoolDied:
            self._linked = None
            raise
        assert len(set(counts)) == 1, counts  # each bucket has a checksum; this counts them
        self.version = version
        seconds = time.monotonic() - began
        return {"sync/gb": counts[0] / 2**30, "time/sync_s": seconds}

    def check(self, versions: list[int], wanted: int) -> None:
        """Raise StaleWeights if a rollout worker generated with others than `wanted`.

        Args:
            versions: by rank, what each generated with.
        """
        for rank, version in enumerate(versions):
            if version != wanted:
                has = "no whole version" if version == link.UNSYNCED else f"version {version}"
                raise StaleWeights(
                    f"rollout rank {rank} has {has} of the weights, not version {wanted}; "
                    "weights must be synced before rollouts"
                )

    def _stored(self) -> bool:
        """Whether to go through the object store; connects, if that is to be avoided."""
        epochs = (self.actor.epoch, self.rollout.epoch)
        if self._takes_turns():
            return True
        if not self._through_store and self._linked != epochs:
            try:
                self._connect()
                self._linked = epochs
            except RayTaskError as error:
                if self.config.transport != "auto":
                    raise
                self._raise_dead()
                reason = str(error.cause).splitlines()[0]
                self.pools.say(f"weights go through the object store: no process group ({reason})")
                self._through_store = True
        return self._through_store

    def _takes_turns(self) -> bool:
        """On shared bundles one side never waits for the other."""
        return self.actor.turn is self.rollout.turn

    def _connect(self) -> None:
        self.attempts += 1
        config = self.config
        (meeting, *_) = self.actor.call(link.meet, config.timeout_s)
        common = {
            "size": 1 + len(self.rollout.workers),
            "backend": self._backend(),
            "config": config,
        }
        key = str(self.attempts)
        ends = self.actor.call(link.connect, meeting, key, rank=0, **common)
        ends += self.rollout.call(link.connect, meeting, key, rank=None, **common)
        self.pools.wait(ends, "linking actor and rollout", timeout_s=config.timeout_s + MARGIN_S)

    def _backend(self) -> str:
        if self.config.transport in ("nccl", "gloo"):
            return self.config.transport
        pools = (self.actor.config, self.rollout.config)
        gpus = all(pool.gpus_per_worker >= 1 for pool in pools)
        return "nccl" if gpus and not any(pool.share_with for pool in pools) else "gloo"

    def _broadcast(self, version: int) -> list[int]:
        sent = self.actor.call(link.send, version)
        received = self.rollout.call(link.receive, version)
        counts = self._get([*sent, *received], version)
        return [counts[0], *counts[len(sent) :]]

    def _through_ray(self, version: int) -> list[int]:
        config = self.config
        shipped, *others = self.actor.call(link.ship, version, config.bucket_mb)
        received = self.rollout.call(link.unship, shipped, version, config.timeout_s)
        return self._get([*received, *others], version)[: len(received)]

    def _get(self, refs: list[Any], version: int) -> list[Any]:
        limit = self.config.timeout_s + MARGIN_S
        return self.pools.get(refs, f"weight sync of version {version}", timeout_s=limit)

    def _explain(self, error: RayTaskError) -> NoReturn:
        """Find out which side failed: who is dead, else who does not answer."""
        self._linked = None  # what is under way in the old group stays there
        self._raise_dead()
        if isinstance(error.cause, SyncError):
            for pool in (self.rollout, self.actor):
                if silent := pool.silent(PING_S):
                    raise PoolDied(pool.role, silent, f"does not answer: {error.cause}") from error
            raise error.cause from None
        raise error

    def _raise_dead(self) -> None:
        for pool in (self.rollout, self.actor):
            if dead := pool.dead(PING_S):
                raise PoolDied(pool.role, dead, "died during weight sync")

"""Weight sync from actor to rollout workers, by a process group or Ray's object store."""

import time
from typing import Any, NoReturn

import ray
from ray.exceptions import RayTaskError

from medgpt.config.pools import SyncConfig
from medgpt.rlhf.pools.pool import Pool, failure
from medgpt.rlhf.pools.pools import WORKER_DEATH_S, PoolDied, Pools
from medgpt.rlhf.rollout_batch import NO_VERSION
from medgpt.rlhf.weight_sync import process_group
from medgpt.rlhf.weight_sync.buckets import SyncError, WeightsCorrupted, WeightsRejected

REPORT_MARGIN_S = 30  # extra time in which workers report their own timeout and name the peer


class WeightSync:
    """Sends versions of the actor's weights to all rollout workers.

    The roles implement `process_group.Sender` and `process_group.Receiver`.
    """

    def __init__(
        self, actor: Pool[Any], rollout: Pool[Any], pools: Pools, config: SyncConfig
    ) -> None:
        self.actor, self.rollout, self.pools, self.config = actor, rollout, pools, config
        self.version = NO_VERSION
        """Version that all rollout workers hold."""
        self.num_connects = 0
        self._connected: tuple[int, int] | None = None  # group numbers of the pools
        self._unreachable: tuple[int, int] | None = None
        """Group numbers of pools that could not connect to each other."""

    def run(self, version: int) -> dict[str, float]:
        """Send the weights and return metrics. Corrupted weights are sent once more.

        Raises:
            PoolDied: a worker died or does not answer.
            SyncError: all workers answer, but the weights did not arrive, or arrived corrupted.
        """
        began = time.monotonic()
        self.version = NO_VERSION
        # a worker busy with an earlier call would look lost to its peers
        earlier = [*self.actor.usage(), *self.rollout.usage()]
        self.pools.wait(earlier, "earlier work of actor and rollout")
        try:
            counts = self._transfer(version)
        except WeightsCorrupted as error:
            self.pools.say(f"{error}; sending again")
            counts = self._transfer(version)
        assert len(set(counts)) == 1, counts  # also the number of buckets
        self.version = version
        seconds = time.monotonic() - began
        return {"sync/gb": counts[0] / 2**30, "time/sync_s": seconds}

    def _transfer(self, version: int) -> list[int]:
        """Send once; return the bytes as counted by each member."""
        calls: list[Any] = []
        try:
            calls, byte_refs = self._start_transfer(version)
            # both sides leave the group if a transfer fails
            connected, self._connected = self._connected, None
            timeout_s = self.config.timeout_s + REPORT_MARGIN_S
            self.pools.wait(calls, f"weight sync of version {version}", timeout_s=timeout_s)
            counts = self.pools.get(byte_refs, "bytes of weight sync")
        except RayTaskError as error:
            self._raise_cause(error, calls)
        self._connected = connected
        return counts

    def _start_transfer(self, version: int) -> tuple[list[Any], list[Any]]:
        """Return refs of all calls of a transfer, and of those that return bytes."""
        config = self.config
        if self._uses_object_store():
            stored, *others = self.actor.call(process_group.put_buckets, version, config.bucket_mb)
            received = self.rollout.call(
                process_group.load_buckets, stored, version, config.timeout_s
            )
            return [stored, *others, *received], received
        sent, *others = self.actor.call(process_group.send, version)
        received = self.rollout.call(process_group.receive, version)
        return [sent, *others, *received], [sent, *received]

    def _uses_object_store(self) -> bool:
        """Return whether to use the object store; otherwise connect the pools first. Pools that
        could not connect try again after one of them was rebuilt."""
        if self.config.transport == "object_store" or self._shares_bundles():
            return True
        group_numbers = (self.actor.group_number, self.rollout.group_number)
        if group_numbers not in (self._connected, self._unreachable):
            try:
                self._connect_pools()
                self._connected = group_numbers
            except RayTaskError as error:
                if self.config.transport != "auto":
                    raise
                self._raise_dead()
                reason = str(error.cause).splitlines()[0]
                self.pools.say(f"weights go through the object store: no process group ({reason})")
                self._unreachable = group_numbers
        return self._connected != group_numbers

    def _shares_bundles(self) -> bool:
        """Return whether the pools share bundles: taking turns, they cannot wait for each other."""
        return self.actor.call_order is self.rollout.call_order

    def _connect_pools(self) -> None:
        self.num_connects += 1
        timeout_s = self.config.timeout_s
        (address, *_) = self.actor.call(process_group.open_store, timeout_s)
        size, key = 1 + len(self.rollout.workers), str(self.num_connects)
        args = (process_group.join_group, address, key, size, self._backend(), self.config)
        joins = self.actor.call(*args, sends=True) + self.rollout.call(*args, sends=False)
        wait_s = timeout_s + REPORT_MARGIN_S
        self.pools.wait(joins, "connecting actor and rollout", timeout_s=wait_s)

    def _backend(self) -> str:
        if self.config.transport in ("nccl", "gloo"):
            return self.config.transport
        pools = (self.actor.config, self.rollout.config)
        gpus = all(pool.gpus_per_worker >= 1 for pool in pools)
        return "nccl" if gpus and not any(pool.share_with for pool in pools) else "gloo"

    def _raise_cause(self, error: RayTaskError, calls: list[Any]) -> NoReturn:
        """Raise PoolDied for dead or silent workers, else the most specific SyncError."""
        self._raise_dead()
        if not isinstance(error.cause, SyncError):
            raise error
        # the others notice soon, or after their own timeout
        wait_s = min(self.config.timeout_s, REPORT_MARGIN_S)
        if isinstance(error.cause, WeightsCorrupted):
            wait_s = self.config.timeout_s + REPORT_MARGIN_S
        ended, silent = ray.wait(calls, num_returns=len(calls), timeout=wait_s, fetch_local=False)
        for pool in (self.rollout, self.actor):
            ranks = [rank for ref in silent if (rank := pool.rank_of_ref(ref)) is not None]
            if ranks:
                raise PoolDied(pool.role, ranks, f"does not answer: {error.cause}") from error
        failures = [failure(ref) for ref in ended]
        causes = [f.cause for f in failures if isinstance(f, RayTaskError)]
        errors = [cause for cause in causes if isinstance(cause, SyncError)]
        # a lost peer may be the consequence of the peer's own error
        own = [cause for cause in errors if isinstance(cause, WeightsCorrupted | WeightsRejected)]
        raise (own or errors)[0] from None

    def _raise_dead(self) -> None:
        for pool in (self.rollout, self.actor):
            if dead := pool.dead_ranks(WORKER_DEATH_S):
                raise PoolDied(pool.role, dead, "died during weight sync")

"""The owner of the pools that all trials share: one Ray actor, through which trials call them.

If trials called the pools directly, their calls could reach the ranks of a pool in different
orders, and the collectives of both would deadlock. Here they have one order, and waiting calls of
one method are answered as one batch.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayTaskError

from medgpt.cluster.placement_groups import is_actor_dead, release_orphaned_groups
from medgpt.config.base import ConfigError
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.tune import SHARED_ROLES
from medgpt.rlhf.pools.pool import Pool
from medgpt.rlhf.pools.pools import PoolDied, Pools
from medgpt.rlhf.setup import build_role_pools

BatchedCall = Callable[..., list[Any]]  # a function of medgpt.tune.batched_calls


@dataclass(eq=False)
class PendingCall:
    """A trial's call of a pool."""

    role: str
    method: BatchedCall
    common_args: tuple[Any, ...]  # equal in all calls of a batch
    args: Sequence[Any]  # Ray replaces refs among them by their values
    results: Future[list[Any]] = field(default_factory=Future)  # by rank

    @property
    def batch_key(self) -> tuple[Any, ...]:
        """Calls with the same key can be answered together."""
        return self.role, self.method, self.common_args


class SharedPoolsActor:
    """Calls the pools from one thread; every waiting call has a thread of Ray."""

    def __init__(self, ppo_config: PPOStageConfig) -> None:
        pools = [pool for pool in build_role_pools(ppo_config, 1) if pool.role in SHARED_ROLES]
        self.pools = Pools(pools, ppo_config.pools, wait_s=ppo_config.cluster.wait_s, say=print)
        self.max_failures, self.num_deaths = ppo_config.cluster.max_failures, 0
        self.num_workers: Future[dict[str, int]] = Future()
        self.pending: list[PendingCall] = []
        self.pending_changed = threading.Condition()
        self.num_calls, self.num_batches = 0, 0
        threading.Thread(target=self._serve, daemon=True).start()

    def wait_until_ready(self) -> dict[str, int]:
        """Wait for the pools; return the number of workers of each. Raises ConfigError."""
        return self.num_workers.result()

    def call(
        self, role: str, method: BatchedCall, common_args: tuple[Any, ...], args: Sequence[Any]
    ) -> Any:
        """Return the results of all ranks: a list, or with one rank its result."""
        call = PendingCall(role, method, common_args, args)
        with self.pending_changed:
            self.pending.append(call)
            self.num_calls += 1
            self.pending_changed.notify()
        results = call.results.result()
        return results if len(results) > 1 else results[0]

    def counts(self) -> dict[str, int]:
        """Return the number of calls by trials, and of batches in which they were answered."""
        return {"calls": self.num_calls, "batches": self.num_batches}

    def worker_handles(self, role: str) -> list[Any]:
        """Return the actor handles of the workers of a pool."""
        return self.pools.pools[role].workers

    def _serve(self) -> None:
        actor_id = ray.get_runtime_context().get_actor_id()
        try:
            # left from before a restart
            release_orphaned_groups(lambda creator: creator == actor_id)
            self.pools.start()
        except Exception as error:
            self.num_workers.set_exception(error)
            return
        pools = self.pools.pools.items()
        self.num_workers.set_result({role: len(pool.workers) for role, pool in pools})
        while True:
            with self.pending_changed:
                self.pending_changed.wait_for(lambda: self.pending)
                key = self.pending[0].batch_key
                batch = [call for call in self.pending if call.batch_key == key]
                self.pending = [call for call in self.pending if call not in batch]
            self._run_batch(batch)

    def _run_batch(self, batch: list[PendingCall]) -> None:
        """Answer all calls; if that fails, as when a trial died with its arguments, each alone."""
        try:
            by_rank = self._call_pool(batch)
        except Exception as error:
            if len(batch) == 1:
                batch[0].results.set_exception(error)
                return
            for call in batch:
                self._run_batch([call])
        else:
            for number, call in enumerate(batch):
                call.results.set_result([results[number] for results in by_rank])

    def _call_pool(self, batch: Sequence[PendingCall]) -> list[list[Any]]:
        """Return the results of all calls, by rank. A dead pool is rebuilt and called again."""
        first, died = batch[0], None
        pool: Pool[Any] = self.pools.pools[first.role]
        counts = [len(call.args) for call in batch]
        args = [arg for call in batch for arg in call.args]
        self.num_batches += 1
        while True:
            try:
                if died is not None:
                    self.pools.rebuild(died)
                refs = pool.call(first.method, *first.common_args, counts, *args)
                return self.pools.get(refs, first.method.__name__)
            except PoolDied as error:
                died = error
                self.num_deaths += 1
                if 0 <= self.max_failures < self.num_deaths:
                    raise


class SharedPools(NamedTuple):
    owner: Any  # handle of the SharedPoolsActor
    num_workers: Mapping[str, int]  # of each pool


def start_shared_pools(ppo_config: PPOStageConfig, *, num_callers: int) -> SharedPools:
    """Start the shared pools. Ray restarts their owner if it is lost, which restarts the pools.
    Raises ConfigError without room for them, or if a role does."""
    actor_class: Any = ray.remote(SharedPoolsActor)
    owner = actor_class.options(
        num_cpus=0,
        max_concurrency=4 * num_callers + 4,
        max_restarts=-1,
        max_task_retries=-1,
        scheduling_strategy="SPREAD",  # outside any placement group
    ).remote(ppo_config)
    try:
        return SharedPools(owner, ray.get(owner.wait_until_ready.remote()))
    except RayTaskError as error:
        stop_shared_pools(owner)
        if isinstance(error.cause, ConfigError):
            raise error.cause from None
        raise


def stop_shared_pools(owner: Any) -> None:
    """Stop the owner and its pools."""
    ray.kill(owner)
    release_orphaned_groups(
        lambda creator: creator == owner._actor_id.hex() or is_actor_dead(creator)
    )

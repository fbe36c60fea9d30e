"""All worker pools of a job: starting, waiting for calls, rebuilding after deaths."""

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError
from ray.experimental import get_local_object_locations

from medgpt.cluster.capacity import check_capacity, pool_demands
from medgpt.cluster.placement_groups import Gang, acquire_gang, draining_nodes, wait_for_lost_nodes
from medgpt.cluster.wait_for_resources import waiting_line
from medgpt.config.base import ConfigError
from medgpt.config.pools import PoolsConfig
from medgpt.rlhf.pools.pool import CallOrder, Pool, find_dead_ranks

Say = Callable[[str], None]
LOG_AFTER_S = 30  # log a wait that takes longer
WORKER_DEATH_S = 3  # seconds until Ray notices a dead worker
DRAIN_CHECK_S = 2  # seconds between checks for draining nodes
MAX_STARTS = 3  # attempts to start all pools while workers die
NODE_LOSS_S = 90  # seconds until Ray notices a lost node
SETTLE_S = 0.5  # seconds until simultaneous deaths are all known


class PoolDied(Exception):
    """Workers of a pool died or do not answer; `Pools.rebuild` restarts them."""

    def __init__(self, role: str, ranks: Sequence[int], reason: str) -> None:
        super().__init__(role, list(ranks), reason)
        self.role, self.ranks, self.reason = role, list(ranks), reason

    def __str__(self) -> str:
        return f"{self.role} pool: rank {', '.join(map(str, self.ranks))} {self.reason}"


class NodesDraining(Exception):
    """Nodes that hold pools are draining but still work; `Pools.move` moves the pools off them."""

    def __init__(self, roles: Collection[str], seconds: float) -> None:
        super().__init__(sorted(roles), seconds)
        self.roles, self.seconds = sorted(roles), seconds

    def __str__(self) -> str:
        remaining = "" if math.isinf(self.seconds) else f" in {self.seconds:.0f} s"
        pools = f"the {' and '.join(self.roles)} pool{'s' if len(self.roles) > 1 else ''}"
        return f"a node of {pools} will be drained{remaining}"


class DataLost(Exception):
    """An object that one pool made for another is lost, although no worker is known to be dead."""


class Pools:
    """All pools of a job.

    Args:
        data_cpus: CPUs that a data task needs besides the pools.
    """

    def __init__(
        self,
        pools: Sequence[Pool[Any]],
        config: PoolsConfig,
        *,
        wait_s: float,
        say: Say,
        data_cpus: float = 0,
    ) -> None:
        self.pools: Mapping[str, Pool[Any]] = {pool.role: pool for pool in pools}
        self.config, self.wait_s, self.say, self.data_cpus = config, wait_s, say, data_cpus
        self._gang = Gang({})

    def preflight(self) -> None:
        """Raises ConfigError if the cluster can never hold all pools."""
        configs = {role: pool.config for role, pool in self.pools.items()}
        check_capacity(pool_demands(configs), data_cpus=self.data_cpus)

    def start(self) -> None:
        """Place all pools and build all roles, at the same time.

        Raises:
            ConfigError: the cluster has no room within `wait_s`, or a role raised it.
            PoolDied: workers died in each of MAX_STARTS attempts.
        """
        self.preflight()
        for attempt in range(1, MAX_STARTS + 1):
            try:
                self._start(self.pools)
                return
            except PoolDied as died:
                self.close()
                if attempt == MAX_STARTS:
                    raise
                self.say(f"{died} before it was ready; starting all pools again")

    def move(self, roles: Collection[str]) -> None:
        """Restart these pools on nodes that are not draining.

        Raises:
            ConfigError, PoolDied: see `start`.
        """
        for role in roles:
            self.pools[role].stop()
        groups = self._gang.groups
        Gang({role: groups[role] for role in roles}).release()
        self._gang = Gang({role: group for role, group in groups.items() if role not in roles})
        self._start(roles)

    def _start(self, roles: Iterable[str]) -> None:
        configs = {role: self.pools[role].config for role in roles}
        gang = acquire_gang(configs, wait_s=self.wait_s, say=self.say)
        self._gang = Gang({**self._gang.groups, **gang.groups})
        num_pools = Counter(group.id for group in gang.groups.values())
        call_orders = {group: CallOrder(num_pools=count) for group, count in num_pools.items()}
        refs = []
        for role, group in gang.groups.items():
            call_order, timeout_s = call_orders[group.id], self.config.call_timeout_s
            refs += self.pools[role].start(group, call_order, timeout_s=timeout_s)
        self.get(refs, "starting workers", timeout_s=self.config.join_timeout_s)

    def check_nodes(self) -> None:
        """Raises NodesDraining if a node that holds one of the pools is draining."""
        ending = draining_nodes()
        if ending and (roles := self._gang.roles_on(ending)):
            raise NodesDraining(roles, min(ending.values()))

    def get(
        self, refs: Sequence[Any], purpose: str, *, timeout_s: float | None = None
    ) -> list[Any]:
        """Return the values of `refs`, in order; the first error ends the wait.

        Args:
            purpose: names the wait in messages and errors.
            timeout_s: by default pools.call_timeout_s.

        Raises:
            ConfigError: raised by a role.
            PoolDied: a worker died or did not answer in time.
            DataLost: a value or an argument of its call is lost.
            RayTaskError: any other error raised by a role.
        """
        self.wait(refs, purpose, timeout_s=timeout_s)
        try:
            return ray.get(list(refs))
        except ObjectLostError as error:
            self._raise_lost(error, error)

    def wait(
        self,
        refs: Sequence[Any],
        purpose: str,
        *,
        timeout_s: float | None = None,
        watch_nodes: bool = False,
    ) -> None:
        """Wait until all `refs` are ready, like `get` but without fetching the values.

        Args:
            watch_nodes: end the wait if a node of the pools is draining.

        Raises:
            NodesDraining: see `check_nodes`; only with `watch_nodes`.
        """
        limit_s = self.config.call_timeout_s if timeout_s is None else timeout_s
        began = now = last_progress = time.monotonic()
        logged, pending = False, list(refs)
        while pending:
            wait_s = max(0.0, min(DRAIN_CHECK_S, began + limit_s - now))
            done, pending = ray.wait(pending, timeout=wait_s, fetch_local=False)
            for ref in done:
                self._raise_if_failed(ref)
            now = time.monotonic()
            if pending and now > began + limit_s:
                late = self._workers_of(pending)
                ranks = [rank for role, rank in late if role == late[0][0]]
                reason = f"did not answer within {limit_s:g} s of {purpose}"
                raise PoolDied(late[0][0], ranks, reason)
            last_progress = now if done else last_progress
            if pending and not logged and now > last_progress + LOG_AFTER_S:
                workers = ", ".join(f"{role} {rank}" for role, rank in self._workers_of(pending))
                self.say(f"{purpose}: {waiting_line(limit_s, workers)}")
                logged = True
            if pending and not done and watch_nodes:
                self.check_nodes()

    def rebuild(self, died: PoolDied) -> set[str]:
        """Rebuild the dead pool and others that died with it; return their roles.

        Raises:
            ConfigError, PoolDied: see `start`.
        """
        dead = find_dead_ranks(self.pools.values(), SETTLE_S)
        for role, ranks in dead.items():
            if role != died.role:
                self.say(f"{PoolDied(role, ranks, 'died, too')}; the pool is rebuilt")
        dead[died.role] = sorted({*died.ranks, *dead.get(died.role, [])})
        wait_for_lost_nodes(NODE_LOSS_S)
        refs = [ref for role, ranks in dead.items() for ref in self.pools[role].restart(ranks)]
        purpose = f"rebuilding {' and '.join(f'the {role} pool' for role in dead)}"
        self.get(refs, purpose, timeout_s=self.wait_s)
        return set(dead)

    def close(self) -> None:
        for pool in self.pools.values():
            pool.stop()
        self._gang.release()
        self._gang = Gang({})

    def put(self, value: Any) -> Any:
        """Return an object ref of `value`, to pass to calls."""
        return ray.put(value)

    def _raise_if_failed(self, ref: Any) -> None:
        """Raise the error of a ready `ref`, if any, as PoolDied, DataLost or ConfigError."""
        if get_local_object_locations([ref])[ref]["node_ids"]:
            return  # large values are no errors
        try:
            ray.get(ref)
        except (RayTaskError, RayActorError, ObjectLostError) as error:
            self._raise_as_pool_error(ref, error)

    def _raise_as_pool_error(self, ref: Any, error: RayError) -> NoReturn:
        cause: BaseException = error
        while isinstance(cause, RayTaskError) and cause.cause is not None:  # perhaps of an argument
            cause = cause.cause
        if isinstance(cause, ConfigError):
            raise cause from None
        if isinstance(cause, ObjectLostError | DataLost):  # DataLost from pools of another process
            self._raise_lost(error, cause)
        for pool in self.pools.values():
            if isinstance(cause, RayActorError):
                rank = pool.rank_of_actor(cause.actor_id)
                if rank is not None:  # Ray may not know all deaths yet when a node is lost
                    ranks = sorted({rank, *pool.dead_ranks(SETTLE_S)})
                    raise PoolDied(pool.role, ranks, "died") from error
        for pool in self.pools.values():
            # a collective fails when another rank dies, perhaps before Ray notices
            is_of_pool = pool.rank_of_ref(ref) is not None
            if is_of_pool and (ranks := pool.dead_ranks(WORKER_DEATH_S)):
                raise PoolDied(pool.role, ranks, "died") from error
        raise error

    def _raise_lost(self, error: RayError, cause: Exception) -> NoReturn:
        """Raise PoolDied if workers died with the node that held the data, else DataLost."""
        for role, ranks in find_dead_ranks(self.pools.values(), WORKER_DEATH_S).items():
            raise PoolDied(role, ranks, "died") from error
        raise DataLost(f"data between the pools is lost ({type(cause).__name__})") from error

    def _workers_of(self, refs: Iterable[Any]) -> list[tuple[str, int]]:
        """Return role and rank of the workers that compute `refs`."""
        pairs = ((role, pool.rank_of_ref(r)) for r in refs for role, pool in self.pools.items())
        return sorted({(role, rank) for role, rank in pairs if rank is not None})

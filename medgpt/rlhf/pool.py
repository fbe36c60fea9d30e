"""Pools of Ray actors: one for each role, started together, waited for together.

A role is a plain class. `pool.call(Actor.update, ref)` runs `Actor.update(role, value)` in every
worker of the pool and returns a ref for each; refs go from pool to pool, the driver sees metrics.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NoReturn, TypeVar

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError
from ray.experimental import get_local_object_locations
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from medgpt.config import ConfigError, PoolsConfig, RoleConfig
from medgpt.rlhf.placement import Gang, acquire, await_lost_nodes, ending_nodes
from medgpt.rlhf.worker import Seat, Worker
from medgpt.train.capacity import of_pools, preflight

Role = TypeVar("Role")
Say = Callable[[str], None]
SAID_AFTER_S = 30  # a wait that takes longer is told
PING_S = 3  # in which Ray knows that a worker died
WATCH_S = 2  # between looks whether the end of a node was announced
STARTS = 3  # after so many deaths of workers that start, there is a reason
NODE_LOST_S = 90  # in which Ray knows that a node is lost
SETTLE_S = 0.5  # in which workers that died together are all known to have died


class PoolDied(Exception):
    """Workers of a pool are gone, or do not answer; `Pools.rebuild` makes the pool work again."""

    def __init__(self, role: str, ranks: Sequence[int], why: str) -> None:
        super().__init__(role, list(ranks), why)
        self.role, self.ranks, self.why = role, list(ranks), why

    def __str__(self) -> str:
        return f"{self.role} pool: rank {', '.join(map(str, self.ranks))} {self.why}"


class Leaving(Exception):
    """Nodes that hold pools end soon, while all still work; `Pools.move` takes the pools away."""

    def __init__(self, roles: Collection[str], seconds: float) -> None:
        super().__init__(sorted(roles), seconds)
        self.roles, self.seconds = sorted(roles), seconds

    def __str__(self) -> str:
        left = "" if math.isinf(self.seconds) else f" in {self.seconds:.0f} s"
        pools = f"the {' and '.join(self.roles)} pool{'s' if len(self.roles) > 1 else ''}"
        return f"the end of a node of {pools} was announced{left}"


class DataLost(Exception):
    """What one pool made for another is gone, although nobody is known to have died."""


@dataclass
class Turn:
    """Whose calls run on bundles that several pools share: in the order in which they are made.

    The driver orders them. Locks in the workers could give one rank to one pool and the next rank
    to another, and collectives of both would wait for ever.
    """

    sharers: int
    role: str = ""
    latest: list[Any] = field(default_factory=list)
    """Refs of the last call."""

    def before(self, role: str) -> list[Any]:
        """What a call of `role` must wait for."""
        after = [] if role == self.role else self.latest
        self.role = role
        return after


class Pool(Generic[Role]):
    """All workers of one role; `Pools` starts it.

    Args:
        make: runs in every worker, with torch.distributed's default group set up, and returns the
            role. A ConfigError of it reaches the driver as such.
        independent: no rank needs another one's memory, so a dead one is replaced alone; the
            others keep their role. Else, and if it dies while the group forms, the death of one
            ends and rebuilds all.
    """

    def __init__(
        self,
        role: str,
        config: RoleConfig,
        make: Callable[[], Role],
        *,
        independent: bool = False,
    ) -> None:
        self.role, self.config, self.make, self.independent = role, config, make, independent
        self.workers: list[Any] = []
        self.epoch = 0
        """Process groups formed so far."""
        self.timeout_s = 0.0
        self.turn = Turn(sharers=1)
        self._group: PlacementGroup | None = None
        self._forming: list[Any] = []
        """Refs of the latest process group's forming."""

    def call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> list[ray.ObjectRef]:
        """Run `method(role, *args, **kwargs)` in every worker; a ref for each, by rank.

        Refs among the arguments arrive as their values. Calls run in the order in which they are
        made.
        """
        after = self.turn.before(self.role)
        refs = [worker.call.remote(method, after, *args, **kwargs) for worker in self.workers]
        self.turn.latest = refs
        return refs

    def begin(self, group: PlacementGroup, turn: "Turn", *, timeout_s: float) -> list[Any]:
        """Start all workers on the bundles of `group`; refs that resolve when they are ready."""
        self._group, self.turn, self.timeout_s = group, turn, timeout_s
        self.workers = [self._start(rank) for rank in range(self.config.num_workers)]
        return self._form(range(len(self.workers)))

    def replace(self, dead: Iterable[int]) -> list[Any]:
        """Make new workers for `dead`, or for all ranks; refs as of `begin`."""
        alone = self.independent and self._is_formed()
        ranks = list(dead) if alone else list(range(len(self.workers)))
        for rank in ranks:
            ray.kill(self.workers[rank])
            self.workers[rank] = self._start(rank)
        return self._form(ranks)

    def end(self) -> None:
        for worker in self.workers:
            ray.kill(worker)
        self.workers = []

    def pings(self) -> list[ray.ObjectRef]:
        """A ref for each worker, ready when its earlier calls are done."""
        return [worker.ping.remote() for worker in self.workers]

    def usage(self) -> list[ray.ObjectRef]:
        """A ref for each worker to the Usage of the latest call before this one."""
        return [worker.usage.remote() for worker in self.workers]

    def dead(self, timeout_s: float) -> list[int]:
        """Ranks that are known to have died; a busy one is not."""
        return _dead([self], timeout_s).get(self.role, [])

    def rank_of(self, ref: Any) -> int | None:
        """Of the worker that makes `ref`, if it is one of this pool."""
        return self.rank_with(ref.task_id().actor_id().hex())

    def rank_with(self, actor_id: str) -> int | None:
        """Of the worker with this id, in hexadecimal."""
        ids = [worker._actor_id.hex() for worker in self.workers]
        return ids.index(actor_id) if actor_id in ids else None

    def _start(self, rank: int) -> Any:
        assert self._group is not None, "not started"
        config = self.config
        seat = Seat(
            role=self.role,
            rank=rank,
            world_size=config.num_workers,
            threads=max(1, int(config.cpus_per_worker)),
            gpu=config.gpus_per_worker > 0,
            offload=config.offload,
            timeout_s=self.timeout_s,
        )
        remote: Any = ray.remote(
            num_cpus=config.cpus_per_worker / self.turn.sharers,
            num_gpus=config.gpus_per_worker / self.turn.sharers,
            resources={name: n / self.turn.sharers for name, n in config.resources.items()},
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=rank
            ),
        )(Worker)
        return remote.remote(seat)

    def _form(self, fresh: Iterable[int]) -> list[Any]:
        """A new process group of all workers, then roles in the `fresh` ones."""
        self.epoch += 1
        loads = [self.workers[rank].load.remote(self.make) for rank in fresh]
        address = self.workers[0].offer.remote()
        joins = [worker.join.remote(address, self.epoch) for worker in self.workers]
        builds = [self.workers[rank].build.remote() for rank in fresh]
        self._forming = [*loads, *joins, *builds]
        return self._forming

    def _is_formed(self) -> bool:
        """Whether all ranks have joined the group and hold a role; else some wait for one that
        died, and can do nothing else."""
        done, pending = ray.wait(self._forming, num_returns=len(self._forming), timeout=0)
        return not pending and not any(map(_failed, done))


class Pools:
    """All pools of a job.

    Args:
        data_cpus: what a data task needs beside the pools.
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
        preflight(of_pools(self._configs()), data_cpus=self.data_cpus)

    def start(self) -> None:
        """Place all pools and have every role made; all start at the same time.

        Raises:
            ConfigError: no room within `wait_s` or ever, or what a role refused.
            PoolDied: workers did not live through it, again and again.
        """
        self.preflight()
        for start in range(1, STARTS + 1):
            try:
                self._start(self.pools)
                return
            except PoolDied as died:
                self.close()
                if start == STARTS:
                    raise
                self.say(f"{died} before it was ready; all pools start again")

    def move(self, roles: Collection[str]) -> None:
        """Place these pools anew, where no node is about to end, and have their roles made.

        Raises:
            ConfigError, PoolDied: as of `start`.
        """
        for role in roles:
            self.pools[role].end()
        groups = self._gang.groups
        Gang({role: groups[role] for role in roles}).release()
        self._gang = Gang({role: group for role, group in groups.items() if role not in roles})
        self._start(roles)

    def _start(self, roles: Iterable[str]) -> None:
        configs = {role: self.pools[role].config for role in roles}
        gang = acquire(configs, wait_s=self.wait_s, say=self.say)
        self._gang = Gang({**self._gang.groups, **gang.groups})
        sharers = Counter(group.id for group in gang.groups.values())
        turns = {group: Turn(sharers=count) for group, count in sharers.items()}
        refs = []
        for role, group in gang.groups.items():
            turn, limit = turns[group.id], self.config.call_timeout_s
            refs += self.pools[role].begin(group, turn, timeout_s=limit)
        self.get(refs, "starting workers", timeout_s=self.config.join_timeout_s)

    def check_nodes(self) -> None:
        """Raises Leaving if the end of a node that holds one of the pools was announced."""
        ending = ending_nodes()
        if ending and (roles := self._gang.roles_on(ending)):
            raise Leaving(roles, min(ending.values()))

    def get(self, refs: Sequence[Any], what: str, *, timeout_s: float | None = None) -> list[Any]:
        """Values of `refs`, in their order; the first error ends the wait for the others.

        Args:
            what: names the wait in messages and errors.
            timeout_s: default pools.call_timeout_s.

        Raises:
            ConfigError: of a role.
            PoolDied: a worker is gone, or did not answer in time.
            DataLost: a value, or what it was to be made from, is gone.
            RayTaskError: any other error of a role.
        """
        self.wait(refs, what, timeout_s=timeout_s)
        try:
            return ray.get(list(refs))
        except ObjectLostError as error:
            self._raise_lost(error, error)

    def wait(
        self, refs: Sequence[Any], what: str, *, timeout_s: float | None = None, watch: bool = False
    ) -> None:
        """Return when all `refs` are there; as `get`, but values stay where they are.

        Args:
            watch: do not wait for what a node will not live to see.

        Raises:
            Leaving: as of `check_nodes`, if told to watch.
        """
        limit = self.config.call_timeout_s if timeout_s is None else timeout_s
        began, said, pending = time.monotonic(), False, list(refs)
        latest = began
        while pending:
            now = time.monotonic()
            patience = max(0.0, min(WATCH_S, began + limit - now))
            done, pending = ray.wait(pending, timeout=patience, fetch_local=False)
            for ref in done:
                self._check(ref)
            now = time.monotonic()
            if pending and now > began + limit:
                self._give_up(pending, f"did not answer within {limit:g} s of {what}")
            latest = now if done else latest
            if pending and not said and now > latest + SAID_AFTER_S:
                workers = ", ".join(f"{role} {rank}" for role, rank in self._whose(pending))
                self.say(f"{what}: waiting up to {limit:g} s for {workers}")
                said = True
            if pending and not done and watch:
                self.check_nodes()

    def rebuild(self, died: PoolDied) -> set[str]:
        """Make the dead pool work again, and others that died with it; living ones stay as they
        are. Returns the roles of those that were rebuilt.

        Raises:
            ConfigError, PoolDied: as of `start`.
        """
        gone = _dead(self.pools.values(), SETTLE_S)
        for role, ranks in gone.items():
            if role != died.role:
                self.say(f"{PoolDied(role, ranks, 'died, too')}; the pool is rebuilt")
        gone[died.role] = sorted({*died.ranks, *gone.get(died.role, [])})
        await_lost_nodes(NODE_LOST_S)
        refs = [ref for role, ranks in gone.items() for ref in self.pools[role].replace(ranks)]
        what = f"rebuilding {' and '.join(f'the {role} pool' for role in gone)}"
        self.get(refs, what, timeout_s=self.wait_s)
        return set(gone)

    def close(self) -> None:
        for pool in self.pools.values():
            pool.end()
        self._gang.release()
        self._gang = Gang({})

    def put(self, value: Any) -> Any:
        """A ref of `value`, for calls."""
        return ray.put(value)

    def _configs(self) -> dict[str, RoleConfig]:
        return {name: pool.config for name, pool in self.pools.items()}

    def _check(self, ref: Any) -> None:
        """Raise the error that the ready `ref` holds, as the caller can use it."""
        if get_local_object_locations([ref])[ref]["node_ids"]:
            return  # a large value; errors are small and come to the owner of the ref
        try:
            ray.get(ref)
        except (RayTaskError, RayActorError, ObjectLostError) as error:
            self._raise(ref, error)

    def _raise(self, ref: Any, error: RayError) -> NoReturn:
        cause: BaseException = error
        while (
            isinstance(cause, RayTaskError) and cause.cause is not None
        ):  # of an argument, perhaps
            cause = cause.cause
        if isinstance(cause, ConfigError):
            raise cause from None
        if isinstance(cause, ObjectLostError | DataLost):  # the latter in pools of others
            self._raise_lost(error, cause)
        for pool in self.pools.values():
            if isinstance(cause, RayActorError):
                rank = pool.rank_with(cause.actor_id)
                if rank is not None:  # what Ray's tables tell yet, or not, when a node is lost
                    ranks = sorted({rank, *pool.dead(SETTLE_S)})
                    raise PoolDied(pool.role, ranks, "died") from error
        for pool in self.pools.values():
            # a collective fails when another rank dies, perhaps before Ray knows
            if pool.rank_of(ref) is not None and (dead := pool.dead(PING_S)):
                raise PoolDied(pool.role, dead, "died") from error
        raise error

    def _raise_lost(self, error: RayError, cause: Exception) -> NoReturn:
        """Data goes with the node that holds it, and often a pool's workers do, too."""
        for role, ranks in _dead(self.pools.values(), PING_S).items():
            raise PoolDied(role, ranks, "died") from error
        raise DataLost(f"data between the pools is gone ({type(cause).__name__})") from error

    def _whose(self, refs: Iterable[Any]) -> list[tuple[str, int]]:
        found = [
            (name, rank)
            for ref in refs
            for name, pool in self.pools.items()
            if (rank := pool.rank_of(ref)) is not None
        ]
        return sorted(set(found))

    def _give_up(self, refs: Sequence[Any], why: str) -> NoReturn:
        late = self._whose(refs)
        role = late[0][0]
        raise PoolDied(role, [rank for name, rank in late if name == role], why)


def _dead(pools: Iterable[Pool[Any]], timeout_s: float) -> dict[str, list[int]]:
    """By role the ranks that are known to have died; roles without any are left out."""
    pings = {ping: (p.role, rank) for p in pools for rank, ping in enumerate(p.pings())}
    ready, _ = ray.wait(list(pings), num_returns=len(pings), timeout=timeout_s)
    found: dict[str, list[int]] = {}
    for role, rank in sorted(pings[ping] for ping in ready if _is_dead(ping)):
        found.setdefault(role, []).append(rank)
    return found


def _is_dead(ref: Any) -> bool:
    return isinstance(_failed(ref), RayActorError)


def _failed(ref: Any) -> RayError | None:
    """The error that is there instead of a value."""
    try:
        ray.get(ref)
    except RayError as error:
        return error
    return None

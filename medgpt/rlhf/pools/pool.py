"""A pool: the Ray actors of one role.

A role is a plain class. `pool.call(Actor.update, ref)` runs `Actor.update(role, value)` in every
worker of the pool and returns a ref for each; refs go from pool to pool, the driver sees metrics.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from medgpt.config.pools import RoleConfig
from medgpt.rlhf.pools.worker import Worker, WorkerSpec

Role = TypeVar("Role")


@dataclass
class CallOrder:
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
        self.turn = CallOrder(sharers=1)
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

    def begin(self, group: PlacementGroup, turn: CallOrder, *, timeout_s: float) -> list[Any]:
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
        return dead_ranks([self], timeout_s).get(self.role, [])

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
        seat = WorkerSpec(
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
        return not pending and not any(map(_failure, done))


def dead_ranks(pools: Iterable[Pool[Any]], timeout_s: float) -> dict[str, list[int]]:
    """By role the ranks that are known to have died; roles without any are left out."""
    pings = {ping: (p.role, rank) for p in pools for rank, ping in enumerate(p.pings())}
    ready, _ = ray.wait(list(pings), num_returns=len(pings), timeout=timeout_s)
    found: dict[str, list[int]] = {}
    for role, rank in sorted(pings[ping] for ping in ready if _is_dead(ping)):
        found.setdefault(role, []).append(rank)
    return found


def _is_dead(ref: Any) -> bool:
    return isinstance(_failure(ref), RayActorError)


def _failure(ref: Any) -> RayError | None:
    """The error that is there instead of a value."""
    try:
        ray.get(ref)
    except RayError as error:
        return error
    return None

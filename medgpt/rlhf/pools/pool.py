"""A worker pool: the Ray actors of one role.

A role is a plain class. `pool.call(Actor.update, ref)` runs `Actor.update(role, value)` in every
worker of the pool and returns one object ref per worker.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from medgpt.config.pools import RoleConfig
from medgpt.rlhf.pools.worker import Worker

Role = TypeVar("Role")


@dataclass
class CallOrder:
    """Order of calls on bundles that several pools share: the order in which the driver makes them.

    Locks in the workers could give rank 0 to one pool and rank 1 to another; the collectives of
    both would deadlock.
    """

    num_pools: int
    role: str = ""
    latest_refs: list[Any] = field(default_factory=list)
    """Refs of the last call."""

    def refs_to_await(self, role: str) -> list[Any]:
        """Return the refs that a call of `role` must wait for."""
        earlier = [] if role == self.role else self.latest_refs
        self.role = role
        return earlier


class Pool(Generic[Role]):
    """All workers of one role, started by `Pools`.

    Args:
        build_role: builds the role in every worker, once torch.distributed's default group is set
            up. Its ConfigErrors reach the driver as such.
        independent: ranks do not hold parts of one model, so a dead rank is restarted alone and
            the others keep their role. Otherwise, or if a rank dies while the group forms, all
            ranks are restarted.
    """

    def __init__(
        self,
        role: str,
        config: RoleConfig,
        build_role: Callable[[], Role],
        *,
        independent: bool = False,
    ) -> None:
        self.role, self.config = role, config
        self.build_role, self.independent = build_role, independent
        self.workers: list[Any] = []
        self.group_number = 0
        """Number of process groups formed so far."""
        self.timeout_s = 0.0
        self.call_order = CallOrder(num_pools=1)
        self._placement_group: PlacementGroup | None = None
        self._group_refs: list[Any] = []
        """Refs of the calls that form the latest process group."""

    def call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> list[ray.ObjectRef]:
        """Run `method(role, *args, **kwargs)` in every worker; return one ref per rank.

        Refs among the positional arguments, also in lists, arrive as their values. Calls run in the
        order in which they are made.
        """
        earlier = self.call_order.refs_to_await(self.role)
        lengths = [len(arg) if isinstance(arg, list) else None for arg in args]
        flat = [item for arg in args for item in (arg if isinstance(arg, list) else [arg])]
        refs = [
            worker.call.remote(method, earlier, lengths, *flat, **kwargs) for worker in self.workers
        ]
        self.call_order.latest_refs = refs
        return refs

    def start(self, group: PlacementGroup, call_order: CallOrder, *, timeout_s: float) -> list[Any]:
        """Start all workers on the bundles of `group`; return refs that are ready when they are."""
        self._placement_group, self.call_order, self.timeout_s = group, call_order, timeout_s
        self.workers = [self._start_worker(rank) for rank in range(self.config.num_workers)]
        return self._form_group(range(len(self.workers)))

    def restart(self, dead: Iterable[int]) -> list[Any]:
        """Restart the `dead` ranks, or all ranks; return refs as `start` does."""
        only_dead = self.independent and self._is_group_formed()
        ranks = list(dead) if only_dead else list(range(len(self.workers)))
        for rank in ranks:
            ray.kill(self.workers[rank])
            self.workers[rank] = self._start_worker(rank)
        return self._form_group(ranks)

    def stop(self) -> None:
        for worker in self.workers:
            ray.kill(worker)
        self.workers = []

    def usage(self) -> list[ray.ObjectRef]:
        """Return one ref per worker to its Usage, ready when its earlier calls are done."""
        return [worker.usage.remote() for worker in self.workers]

    def dead_ranks(self, timeout_s: float) -> list[int]:
        """Return the ranks known to be dead; a busy rank is not."""
        return find_dead_ranks([self], timeout_s).get(self.role, [])

    def rank_of_ref(self, ref: Any) -> int | None:
        """Return the rank of the worker that computes `ref`, if it is of this pool."""
        return self.rank_of_actor(ref.task_id().actor_id().hex())

    def rank_of_actor(self, actor_id: str) -> int | None:
        """Return the rank of the worker with this hexadecimal actor id, if it is of this pool."""
        ids = [worker._actor_id.hex() for worker in self.workers]
        return ids.index(actor_id) if actor_id in ids else None

    def _start_worker(self, rank: int) -> Any:
        assert self._placement_group is not None, "not started"
        config, num_pools = self.config, self.call_order.num_pools
        worker: Any = ray.remote(
            num_cpus=config.cpus_per_worker / num_pools,
            num_gpus=config.gpus_per_worker / num_pools,
            resources={name: n / num_pools for name, n in config.resources.items()},
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self._placement_group, placement_group_bundle_index=rank
            ),
        )(Worker)
        return worker.remote(self.role, rank, config, self.timeout_s)

    def _form_group(self, new_ranks: Iterable[int]) -> list[Any]:
        """Form a new process group of all workers and build the roles of `new_ranks`."""
        self.group_number += 1
        loads = [self.workers[rank].load_builder.remote(self.build_role) for rank in new_ranks]
        address = self.workers[0].open_store.remote()
        joins = [worker.join_group.remote(address, self.group_number) for worker in self.workers]
        builds = [self.workers[rank].rebuild_role.remote() for rank in new_ranks]
        self._group_refs = [*loads, *joins, *builds]
        return self._group_refs

    def _is_group_formed(self) -> bool:
        """Return whether all ranks joined the group and built their role; if not, some may wait
        forever for a dead one."""
        done, pending = ray.wait(self._group_refs, num_returns=len(self._group_refs), timeout=0)
        return not pending and not any(map(failure, done))


def find_dead_ranks(pools: Iterable[Pool[Any]], timeout_s: float) -> dict[str, list[int]]:
    """Return the ranks known to be dead by role; roles without any are left out."""
    pings = {ping: (p.role, rank) for p in pools for rank, ping in enumerate(p.usage())}
    ready, _ = ray.wait(list(pings), num_returns=len(pings), timeout=timeout_s)
    dead: dict[str, list[int]] = {}
    for role, rank in sorted(
        pings[ref] for ref in ready if isinstance(failure(ref), RayActorError)
    ):
        dead.setdefault(role, []).append(rank)
    return dead


def failure(ref: Any) -> RayError | None:
    """Return the error of a ready ref, or None."""
    try:
        ray.get(ref)
    except RayError as error:
        return error
    return None

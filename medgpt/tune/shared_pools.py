"""The owner of the pools that all trials share: one process, through which trials call them.

Calls of several trials would reach the ranks of a pool in different orders, and collectives of both
would wait for ever; here they have one order. Who waits for the same is answered together.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayTaskError

from medgpt.cluster.placement_groups import is_dead, release_of
from medgpt.config.base import ConfigError
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.tune import FROZEN
from medgpt.rlhf.pools.pool import Pool
from medgpt.rlhf.pools.pools import PoolDied, Pools
from medgpt.rlhf.setup import role_pools

Method = Callable[..., list[Any]]  # of medgpt.tune.batched_calls


@dataclass(eq=False)
class Request:
    """One trial's call of a pool. What it asks of it is the same for all of a batch."""

    role: str
    method: Method
    args: Sequence[Any]  # refs among them arrive as their values
    options: dict[str, Any]
    answered: threading.Event = field(default_factory=threading.Event)
    answers: list[Any] = field(default_factory=list)  # by rank
    error: Exception | None = None

    @property
    def kind(self) -> tuple[Any, ...]:
        return self.role, self.method, sorted(self.options.items())


class Front:
    """A thread of its own speaks to the pools; every waiting call has one of Ray's."""

    def __init__(self, stage: PPOStageConfig) -> None:
        pools = [pool for pool in role_pools(stage, 1) if pool.role in FROZEN]
        self.pools = Pools(pools, stage.pools, wait_s=stage.cluster.wait_s, say=print)
        self.max_failures, self.deaths = stage.cluster.max_failures, 0
        self.started = threading.Event()
        self.error: Exception | None = None
        self.waiting: list[Request] = []
        self.change = threading.Condition()
        self.num_calls, self.num_batches = 0, 0
        threading.Thread(target=self._serve, daemon=True).start()

    def ready(self) -> dict[str, int]:
        """Workers of each pool, once they are there.

        Raises:
            ConfigError: no room, or what a role refused.
        """
        self.started.wait()
        if self.error is not None:
            raise self.error
        return {role: len(pool.workers) for role, pool in self.pools.pools.items()}

    def call(self, role: str, method: Method, args: Sequence[Any], options: dict[str, Any]) -> Any:
        """What each rank answers: a list, or with one rank its answer."""
        request = Request(role, method, args, options)
        with self.change:
            self.waiting.append(request)
            self.num_calls += 1
            self.change.notify()
        request.answered.wait()
        if request.error is not None:
            raise request.error
        return request.answers if len(request.answers) > 1 else request.answers[0]

    def counts(self) -> dict[str, int]:
        """Calls of trials, and batches in which they were answered."""
        return {"calls": self.num_calls, "batches": self.num_batches}

    def workers(self, role: str) -> list[Any]:
        """Actor handles, for those who look after them."""
        return self.pools.pools[role].workers

    def _serve(self) -> None:
        me = ray.get_runtime_context().get_actor_id()
        try:
            release_of(lambda maker: maker == me)  # before it was started again
            self.pools.start()
        except Exception as error:
            self.error = error
        self.started.set()
        while self.error is None:
            with self.change:
                self.change.wait_for(lambda: self.waiting)
                batch = [r for r in self.waiting if r.kind == self.waiting[0].kind]
                self.waiting = [r for r in self.waiting if r not in batch]
            self._answer(batch)

    def _answer(self, batch: list[Request]) -> None:
        """Answer all; if that fails, perhaps because a trial is gone with what it sent, each."""
        try:
            by_rank = self._ask(batch)
        except Exception as error:
            if len(batch) > 1:
                for request in batch:
                    self._answer([request])
                return
            batch[0].error = error
        else:
            for number, request in enumerate(batch):
                request.answers = [answers[number] for answers in by_rank]
        for request in batch:
            request.answered.set()

    def _ask(self, batch: Sequence[Request]) -> list[list[Any]]:
        """By rank, the answers to all. A pool that dies is rebuilt and asked again."""
        first, died = batch[0], None
        pool: Pool[Any] = self.pools.pools[first.role]
        counts = [len(request.args) for request in batch]
        args = [arg for request in batch for arg in request.args]
        self.num_batches += 1
        while True:
            try:
                if died is not None:
                    self.pools.rebuild(died)
                refs = pool.call(first.method, counts, *args, **first.options)
                return self.pools.get(refs, first.method.__name__)
            except PoolDied as error:
                died = error
                self.deaths += 1
                if 0 <= self.max_failures < self.deaths:
                    raise


def start_front(stage: PPOStageConfig, *, num_callers: int) -> tuple[Any, dict[str, int]]:
    """The front's handle, and the workers of each shared pool.

    It is started again by Ray wherever there is room if it is lost, and then starts its pools.

    Raises:
        ConfigError: no room, or what a role refused.
    """
    start: Any = ray.remote(Front)
    front = start.options(
        num_cpus=0,
        max_concurrency=4 * num_callers + 4,
        max_restarts=-1,
        max_task_retries=-1,
        scheduling_strategy="SPREAD",  # in no placement group
    ).remote(stage)
    try:
        return front, ray.get(front.ready.remote())
    except RayTaskError as error:
        stop_front(front)
        if isinstance(error.cause, ConfigError):
            raise error.cause from None
        raise


def stop_front(front: Any) -> None:
    """End it with its pools."""
    ray.kill(front)
    release_of(lambda maker: maker == front._actor_id.hex() or is_dead(maker))

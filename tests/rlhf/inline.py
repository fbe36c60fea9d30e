"""Pools whose only worker is this process, to test the PPO loop without Ray."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from medgpt.config.ppo import PPOStageConfig
from medgpt.data.tokenized.chat_template import stop_token_ids
from medgpt.metrics import ConsoleReporter
from medgpt.models.tokenizer import load_tokenizer
from medgpt.rlhf.pools.pools import DataLost, NodesDraining, PoolDied
from medgpt.rlhf.pools.worker import Usage
from medgpt.rlhf.ppo import PPO
from medgpt.rlhf.rollout_batch import Prompts, Ragged
from medgpt.rlhf.setup import build_role_pools
from medgpt.runs import Run


class InlineRef:
    """Fake object ref: a value, or the error of the call."""

    def __init__(self, value: Any = None, error: Exception | None = None) -> None:
        self.value, self.error = value, error

    def get(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


def resolved(arg: Any) -> Any:
    """Return an argument with refs replaced by their values, also in lists."""
    if isinstance(arg, list):
        return [resolved(item) for item in arg]
    return arg.get() if isinstance(arg, InlineRef) else arg


class InlinePool:
    """Runs calls at once. `dies_at` (method, count) is the call that finds the worker dead."""

    def __init__(self, role: str, make: Callable[[], Any]) -> None:
        self.role, self.build_role, self.worker = role, make, make()
        self.workers = [self]
        self.calls: list[str] = []
        self.dies_at: tuple[str, int] | None = None
        self.loses_at: tuple[str, int | None] | None = None
        """The call (method, count) that finds its arguments lost; count None: every such call."""

    def call(self, method: Callable[..., Any], *args: Any) -> list[InlineRef]:
        self.calls.append(method.__name__)
        if self.dies_at == (method.__name__, self.calls.count(method.__name__)):
            self.dies_at, self.worker = None, None
        if self.worker is None:
            return [InlineRef(error=PoolDied(self.role, [0], "died"))]
        times = self.calls.count(method.__name__)
        if self.loses_at in ((method.__name__, times), (method.__name__, None)):
            return [InlineRef(error=DataLost("gone"))]
        try:
            return [InlineRef(method(self.worker, *map(resolved, args)))]
        except (PoolDied, DataLost) as loss:
            return [InlineRef(error=loss)]

    def usage(self) -> list[InlineRef]:
        return [InlineRef(Usage(rss_gb=0.5, call_s=2.0))]


class InlinePools:
    def __init__(self, config: PPOStageConfig, num_iterations: int) -> None:
        self.pools = {
            pool.role: InlinePool(pool.role, pool.build_role)
            for pool in build_role_pools(config, num_iterations)
        }
        self.rebuilt: list[str] = []
        self.moved: list[str] = []
        self.waits: list[str] = []
        self.drains_at: tuple[str, int] | None = None
        """The wait (purpose, count) during which the nodes of `draining_roles` start to drain."""
        self.draining_roles: list[str] = []
        self.dies_in_get: tuple[str, str] | None = None
        """Purpose of the `get` that finds these space-separated roles dead."""

    def put(self, value: Any) -> InlineRef:
        return InlineRef(value)

    def wait(self, refs: Sequence[InlineRef], purpose: str, *, watch_nodes: bool = False) -> None:
        self.waits.append(purpose)
        if watch_nodes and self.drains_at == (purpose, self.waits.count(purpose)):
            raise NodesDraining(self.draining_roles, 30)
        for ref in refs:
            ref.get()

    def check_nodes(self) -> None:
        self.wait([], "nodes", watch_nodes=True)

    def move(self, roles: Sequence[str]) -> None:
        self.moved += roles
        for role in roles:
            self.pools[role].worker = None
            self.pools[role].worker = self.pools[role].build_role()

    def get(self, refs: Sequence[InlineRef], purpose: str) -> list[Any]:
        if self.dies_in_get is not None and self.dies_in_get[0] == purpose:
            roles, self.dies_in_get = self.dies_in_get[1].split(), None
            for role in roles:
                self.pools[role].worker = None
            raise PoolDied(roles[0], [0], "died")
        return [ref.get() for ref in refs]

    def rebuild(self, died: PoolDied) -> set[str]:
        dead = {role for role, pool in self.pools.items() if pool.worker is None}
        for role in sorted({died.role} | dead):
            self.rebuilt.append(role)
            self.pools[role].worker = self.pools[role].build_role()
        return {died.role} | dead

    def sync(self, version: int) -> dict[str, float]:
        """Copy the actor's weights to the rollout role in memory."""
        actor, rollout = self.pools["actor"].worker, self.pools["rollout"].worker
        for role, worker in (("actor", actor), ("rollout", rollout)):
            if worker is None:
                raise PoolDied(role, [0], "died")
        rollout.load_weights(actor.weights())
        rollout.weights_loaded(version)
        return {"sync/version": float(version)}


def prompt_stream(config: PPOStageConfig) -> Callable[[int], Iterator[Prompts]]:
    """Stream of random prompts, a function of the iteration."""
    assert config.model.name is not None
    ends = stop_token_ids(load_tokenizer(config.model.name))

    def stream(start: int) -> Iterator[Prompts]:
        iteration = start
        while True:
            rng = np.random.default_rng(iteration)
            rows = [rng.integers(5, 200, n) for n in rng.integers(3, 10, 12)]
            rows = [row[~np.isin(row, ends)] for row in rows]
            yield Prompts(
                sample_ids=[f"{iteration}-{i}" for i in range(len(rows))],
                ids=Ragged.from_rows([np.append(row, 50) for row in rows], np.int32),
                messages=['[["user", "?"]]'] * len(rows),
            )
            iteration += 1

    return stream


def make_ppo(config: PPOStageConfig, num_iterations: int, **changes: Any) -> PPO:
    """Return a PPO loop on inline pools; `changes` replace arguments of PPO."""
    run = Run.open("ppo", config, run_dir=config.run.dir, allow_changes=config.run.allow_changes)
    pools = InlinePools(config, num_iterations)
    options: dict[str, Any] = {"prompts": prompt_stream(config), "sync": pools.sync}
    reporter = ConsoleReporter("ppo")
    options |= {"num_iterations": num_iterations, "reporter": reporter, **changes}
    return PPO(run, config, pools, **options)  # type: ignore[arg-type]


def comparable_metrics(run: Run) -> list[dict[str, float]]:
    """Metrics of each step without those that depend on the machine."""
    machine_dependent = ("time", "memory", "attempt", "ppo/samples_per_s", "rollout/tokens_per_s")
    return [
        {name: value for name, value in line.items() if not name.startswith(machine_dependent)}
        for line in run.metrics()
    ]

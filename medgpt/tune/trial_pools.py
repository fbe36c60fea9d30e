"""The pools of a trial: its own, which the next trial of the process reuses, and shared ones."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from medgpt.config.ppo import PPOStageConfig
from medgpt.config.tune import SHARED_ROLES
from medgpt.rlhf.pools.pool import Pool
from medgpt.rlhf.pools.pools import PoolDied, Pools
from medgpt.rlhf.roles.reference import Reference
from medgpt.rlhf.roles.reward import Reward
from medgpt.tune import batched_calls
from medgpt.tune.shared_pools import BatchedCall, SharedPools

BATCHED_CALLS: dict[Callable[..., Any], tuple[BatchedCall, int]] = {
    Reward.score: (batched_calls.score, 0),
    Reward.judge_scores: (batched_calls.judge_scores, 0),
    Reference.logprobs: (batched_calls.logprobs, 1),  # calls of one batch share the temperature
}
"""Method of a role: its batched call, and how many first arguments calls of a batch share."""


class SharedPool(Pool[Any]):
    """A pool that all trials use through its owner, which also repairs it."""

    def __init__(self, pool: Pool[Any], shared: SharedPools) -> None:
        super().__init__(pool.role, pool.config, pool.build_role)
        self.owner, self.num_workers = shared.owner, shared.num_workers[pool.role]

    def call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call the pool as `Pool.call` does, for the methods in BATCHED_CALLS."""
        batched_call, num_common = BATCHED_CALLS[method]
        call = self.owner.call.options(num_returns=self.num_workers)
        refs = call.remote(self.role, batched_call, args[:num_common], list(args[num_common:]))
        return refs if self.num_workers > 1 else [refs]

    def restart(self, dead: Iterable[int]) -> list[Any]:
        return []

    def rank_of_ref(self, ref: Any) -> int | None:
        return 0 if ref.task_id().actor_id() == self.owner._actor_id else None


class TrialPools(Pools):
    """All pools of a trial; with `shared`, reward and reference are shared ones."""

    def __init__(
        self,
        role_pools: Sequence[Pool[Any]],
        config: PPOStageConfig,
        shared: SharedPools | None,
        *,
        say: Callable[[str], None],
    ) -> None:
        shared_roles = SHARED_ROLES if shared is not None else ()
        own_pools = [pool for pool in role_pools if pool.role not in shared_roles]
        super().__init__(own_pools, config.pools, wait_s=config.cluster.wait_s, say=say)
        self.shared: dict[str, SharedPool] = {}
        if shared is not None:
            shared_pools = [pool for pool in role_pools if pool.role in SHARED_ROLES]
            self.shared = {pool.role: SharedPool(pool, shared) for pool in shared_pools}

    def start(self) -> None:
        super().start()
        self.pools = {**self.pools, **self.shared}

    def rebuild_roles(self, pools: Sequence[Pool[Any]]) -> None:
        """Build the roles of these pools in the running workers. Raises PoolDied."""
        refs = []
        for new_pool in pools:
            pool = self.pools[new_pool.role]
            pool.build_role = new_pool.build_role
            refs += [worker.load_builder.remote(pool.build_role) for worker in pool.workers]
            refs += [worker.rebuild_role.remote() for worker in pool.workers]
        self.get(refs, "building the roles of the next trial", timeout_s=self.config.join_timeout_s)


def reuse_or_start(
    kept: TrialPools | None,
    role_pools: Sequence[Pool[Any]],
    config: PPOStageConfig,
    shared: SharedPools | None,
    *,
    say: Callable[[str], None],
) -> TrialPools:
    """Return started pools: the kept ones with the roles of `role_pools`, or else new pools."""
    if kept is not None:
        try:
            kept.rebuild_roles(role_pools)
            return kept
        except BaseException as error:
            kept.close()
            if not isinstance(error, PoolDied):
                raise
    pools = TrialPools(role_pools, config, shared, say=say)
    try:
        pools.start()
    except BaseException:
        pools.close()
        raise
    return pools

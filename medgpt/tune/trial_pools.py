"""The pools of a trial: its own, which the next trial of the process reuses, and shared ones."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from medgpt.config.ppo import PPOStageConfig
from medgpt.config.tune import SHARED_ROLES
from medgpt.rlhf.pools.pool import Pool
from medgpt.rlhf.pools.pools import PoolDied, Pools
from medgpt.rlhf.roles.reference import Reference
from medgpt.rlhf.roles.reward import Reward
from medgpt.tune import batched_calls
from medgpt.tune.shared_pools import BatchedCall


class SharedPool(Pool[Any]):
    """A pool that all trials use through its owner, which also repairs it."""

    def __init__(self, pool: Pool[Any], owner: Any, num_workers: int) -> None:
        super().__init__(pool.role, pool.config, pool.build_role)
        self.owner, self.num_workers = owner, num_workers

    def call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call the pool as `Pool.call` does, for the methods that PPO needs."""
        batched_call: BatchedCall
        options: dict[str, Any] = {}
        if method is Reward.score:
            batched_call = batched_calls.score
        elif method is Reward.judge_scores:
            batched_call = batched_calls.judge_scores
        else:
            assert method is Reference.logprobs, method
            batched_call = batched_calls.logprobs
            options, args = {"temperature": args[0]}, args[1:]
        call = self.owner.call.options(num_returns=self.num_workers)
        refs = call.remote(self.role, batched_call, list(args), options)
        return refs if self.num_workers > 1 else [refs]

    def restart(self, dead: Iterable[int]) -> list[Any]:
        return []

    def rank_of_ref(self, ref: Any) -> int | None:
        return 0 if ref.task_id().actor_id() == self.owner._actor_id else None


class TrialPools(Pools):
    """All pools of a trial; with `shared_pools_actor`, reward and reference are shared ones."""

    def __init__(
        self,
        role_pools: Sequence[Pool[Any]],
        ppo_config: PPOStageConfig,
        *,
        shared_pools_actor: Any,
        num_shared_workers: Mapping[str, int],
        say: Callable[[str], None],
    ) -> None:
        """`num_shared_workers` is the number of workers of each shared pool."""
        own_pools = [
            pool
            for pool in role_pools
            if shared_pools_actor is None or pool.role not in SHARED_ROLES
        ]
        super().__init__(own_pools, ppo_config.pools, wait_s=ppo_config.cluster.wait_s, say=say)
        self.shared = {
            pool.role: SharedPool(pool, shared_pools_actor, num_shared_workers[pool.role])
            for pool in role_pools
            if pool not in own_pools
        }

    def start(self) -> None:
        super().start()
        self.pools = {**self.pools, **self.shared}

    def rebuild_roles(self, pools: Sequence[Pool[Any]]) -> None:
        """Build the roles of these pools in the workers that already run.

        Raises:
            PoolDied: a worker is gone.
        """
        refs = []
        for new_pool in pools:
            pool = self.pools[new_pool.role]
            pool.build_role = new_pool.build_role
            refs += [worker.load_builder.remote(pool.build_role) for worker in pool.workers]
            refs += [worker.rebuild_role.remote() for worker in pool.workers]
        self.get(refs, "building the roles of the next trial", timeout_s=self.config.join_timeout_s)


_pools_between_trials: TrialPools | None = None  # kept by this process between two trials


def reuse_or_start(
    role_pools: Sequence[Pool[Any]], make_pools: Callable[[], TrialPools]
) -> TrialPools:
    """Return started pools: those of the trial before, with new roles, or new pools."""
    global _pools_between_trials
    pools, _pools_between_trials = _pools_between_trials, None
    if pools is not None:
        try:
            pools.rebuild_roles(role_pools)
            return pools
        except PoolDied:
            pools.close()
        except BaseException:
            pools.close()
            raise
    pools = make_pools()
    try:
        pools.start()
    except BaseException:
        pools.close()
        raise
    return pools


def keep_for_next_trial(pools: TrialPools) -> None:
    """Keep the pools for the next trial of this process."""
    global _pools_between_trials
    _pools_between_trials = pools

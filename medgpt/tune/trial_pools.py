"""A trial's pools: its own, which the next trial of the process takes over, and shared ones."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from medgpt.config.ppo import PPOStageConfig
from medgpt.config.tune import FROZEN
from medgpt.rlhf.pools.pool import Pool
from medgpt.rlhf.pools.pools import PoolDied, Pools
from medgpt.rlhf.roles.reference import Reference
from medgpt.rlhf.roles.reward import Reward
from medgpt.tune import batched_calls
from medgpt.tune.shared_pools import Method


class SharedPool(Pool[Any]):
    """A pool that all trials use, through its front, which also repairs it."""

    def __init__(self, own: Pool[Any], front: Any, num_workers: int) -> None:
        super().__init__(own.role, own.config, own.make)
        self.front, self.num_workers = front, num_workers

    def call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """As `Pool.call`, of the methods that PPO needs."""
        together: Method
        options: dict[str, Any] = {}
        if method is Reward.score:
            together = batched_calls.score
        elif method is Reward.judge:
            together = batched_calls.judge
        else:
            assert method is Reference.logprobs, method
            together = batched_calls.logprobs
            options, args = {"temperature": args[0]}, args[1:]
        call = self.front.call.options(num_returns=self.num_workers)
        refs = call.remote(self.role, together, list(args), options)
        return refs if self.num_workers > 1 else [refs]

    def replace(self, dead: Iterable[int]) -> list[Any]:
        return []

    def rank_of(self, ref: Any) -> int | None:
        return 0 if ref.task_id().actor_id() == self.front._actor_id else None


class TrialPools(Pools):
    """Those of `found`; with a front, reward and reference are the front's."""

    def __init__(
        self,
        found: Sequence[Pool[Any]],
        stage: PPOStageConfig,
        *,
        front: Any,
        num_workers: Mapping[str, int],
        say: Callable[[str], None],
    ) -> None:
        """`num_workers`: of the front's pools."""
        own = [pool for pool in found if front is None or pool.role not in FROZEN]
        super().__init__(own, stage.pools, wait_s=stage.cluster.wait_s, say=say)
        self.shared = {
            pool.role: SharedPool(pool, front, num_workers[pool.role])
            for pool in found
            if pool not in own
        }

    def start(self) -> None:
        super().start()
        self.pools = {**self.pools, **self.shared}

    def renew(self, found: Sequence[Pool[Any]]) -> None:
        """Have the same workers make the roles of these pools.

        Raises:
            PoolDied: one of them is gone.
        """
        refs = []
        for fresh in found:
            pool = self.pools[fresh.role]
            pool.make = fresh.make
            refs += [worker.load.remote(pool.make) for worker in pool.workers]
            refs += [worker.build.remote() for worker in pool.workers]
        self.get(refs, "making another trial's roles", timeout_s=self.config.join_timeout_s)


_kept: TrialPools | None = None  # of this process, between two trials


def take(found: Sequence[Pool[Any]], make: Callable[[], TrialPools]) -> TrialPools:
    """Started pools: those that the trial before has left, with the roles of `found`, else new."""
    global _kept
    pools, _kept = _kept, None
    if pools is not None:
        try:
            pools.renew(found)
            return pools
        except PoolDied:
            pools.close()
        except BaseException:
            pools.close()
            raise
    pools = make()
    try:
        pools.start()
    except BaseException:
        pools.close()
        raise
    return pools


def leave(pools: TrialPools) -> None:
    """For the next trial of this process."""
    global _kept
    _kept = pools

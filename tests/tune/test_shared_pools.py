"""Shared pools on Ray: concurrent callers, several ranks, and a worker that dies."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from medgpt.config.base import ConfigError
from medgpt.config.tune import SHARED_ROLES
from medgpt.rlhf.pools.pools import Pools
from medgpt.rlhf.roles.reference import Reference
from medgpt.rlhf.roles.reward import Reward
from medgpt.rlhf.rollout_batch import Logprobs, Scores, Sequences, join_per_sequence, join_per_token
from medgpt.rlhf.setup import build_role_pools
from medgpt.tune.shared_pools import start_shared_pools, stop_shared_pools
from medgpt.tune.trial_pools import TrialPools
from tests.rlhf.cases import ppo_config, sequences, share
from tests.tune.test_batched_calls import prompts

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
SMALL = (
    'reward.functions=[{name="letters",path="tests.tune.cases:letters"}]',
    "pools.reward={num_workers=2,cpus_per_worker=0.2}",
    "pools.reference.cpus_per_worker=0.2",
)


@pytest.fixture(scope="module")
def pools(ray_session: None, base: Path, tmp_path_factory) -> Iterator[TrialPools]:
    """Start shared pools only, with two reward workers."""
    config = ppo_config(tmp_path_factory.mktemp("shared"), base, *SMALL)
    shared = start_shared_pools(config, num_callers=3)
    assert shared.num_workers == {"reward": 2, "reference": 1}
    role_pools = [pool for pool in build_role_pools(config, 1) if pool.role in SHARED_ROLES]
    pools = TrialPools(role_pools, config, shared, say=print)
    pools.start()
    yield pools
    stop_shared_pools(shared.owner)


def call(pools: Pools, batch: Sequences) -> tuple[list[Any], list[Any]]:
    """Return the refs of scores and log-probabilities."""
    parts = [pools.put(share(batch, range(0, len(batch), 2))),
             pools.put(share(batch, range(1, len(batch), 2)))]  # fmt: skip
    scores = pools.pools["reward"].call(Reward.score, pools.put(prompts(batch)), *parts)
    return scores, pools.pools["reference"].call(Reference.logprobs, 0.7, *parts)


def answers(
    pools: Pools, batch: Sequences, refs: tuple[list[Any], list[Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the score of every sequence and the log-probability of every token."""
    scores: list[Scores] = pools.get(refs[0], "scores")
    logprobs: list[Logprobs] = pools.get(refs[1], "logprobs")
    totals = join_per_sequence([(part.index, part.totals) for part in scores])
    return totals, join_per_token(logprobs, batch.responses)


def test_concurrent_callers_get_the_results_of_single_calls(pools: TrialPools) -> None:
    batches = [sequences(num, seed=num) for num in (12, 5, 8)]
    alone = [answers(pools, batch, call(pools, batch)) for batch in batches]
    pending = [call(pools, batch) for batch in batches]
    for batch, refs, (totals, logprobs) in zip(batches, pending, alone, strict=True):
        results = answers(pools, batch, refs)
        np.testing.assert_allclose(results[0], totals, atol=1e-5)
        np.testing.assert_allclose(results[1], logprobs, atol=1e-5)
    owner = next(iter(pools.shared.values())).owner
    counts = ray.get(owner.counts.remote())
    assert counts["calls"] == 12
    assert counts["batches"] <= 12


def test_a_dead_worker_is_replaced_and_the_call_repeated(pools: TrialPools) -> None:
    owner = next(iter(pools.shared.values())).owner
    batch = sequences()
    before = answers(pools, batch, call(pools, batch))
    for role in ("reward", "reference"):
        ray.kill(ray.get(owner.worker_handles.remote(role))[0])
    after = answers(pools, batch, call(pools, batch))
    np.testing.assert_allclose(after[0], before[0], atol=1e-5)
    np.testing.assert_allclose(after[1], before[1], atol=1e-5)


def test_a_config_error_of_a_role_is_raised_before_any_trial(ray_session, base, tmp_path) -> None:
    config = ppo_config(
        tmp_path, base, *SMALL[1:], "reward.score_weight=1.0", f"reward.model={base}"
    )
    with pytest.raises(ConfigError):
        start_shared_pools(config, num_callers=1)

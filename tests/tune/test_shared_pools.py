"""Shared pools on Ray: several callers, ranks, and a worker that dies."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from medgpt.config.base import ConfigError
from medgpt.rlhf.pools.pools import Pools
from medgpt.rlhf.roles.reference import Reference
from medgpt.rlhf.roles.reward import Reward
from medgpt.rlhf.rollout_batch import Logprobs, Scores, Sequences, join_rows, join_tokens
from medgpt.rlhf.setup import role_pools
from medgpt.tune.shared_pools import start_front, stop_front
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
    """Shared ones only, with two workers that score."""
    config = ppo_config(tmp_path_factory.mktemp("front"), base, *SMALL)
    front, num_workers = start_front(config, num_callers=3)
    assert num_workers == {"reward": 2, "reference": 1}
    found = [pool for pool in role_pools(config, 1) if pool.role in num_workers]
    together = TrialPools(found, config, front=front, num_workers=num_workers, say=print)
    together.start()
    yield together
    stop_front(front)


def ask(pools: Pools, whole: Sequences) -> tuple[list[Any], list[Any]]:
    """Refs of its scores and log-probabilities."""
    parts = [pools.put(share(whole, range(0, len(whole), 2))),
             pools.put(share(whole, range(1, len(whole), 2)))]  # fmt: skip
    scores = pools.pools["reward"].call(Reward.score, pools.put(prompts(whole)), *parts)
    return scores, pools.pools["reference"].call(Reference.logprobs, 0.7, *parts)


def answers(
    pools: Pools, whole: Sequences, refs: tuple[list[Any], list[Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """Score of every sequence, log-probability of every token."""
    scores: list[Scores] = pools.get(refs[0], "scores")
    logprobs: list[Logprobs] = pools.get(refs[1], "logprobs")
    totals = join_rows([part.index for part in scores], [part.totals for part in scores])
    return totals, join_tokens(logprobs, whole.responses)


def test_callers_at_the_same_time_get_what_each_would_get_alone(pools: TrialPools) -> None:
    batches = [sequences(num, seed=num) for num in (12, 5, 8)]
    alone = [answers(pools, whole, ask(pools, whole)) for whole in batches]
    asked = [ask(pools, whole) for whole in batches]
    for whole, refs, (totals, logprobs) in zip(batches, asked, alone, strict=True):
        found = answers(pools, whole, refs)
        np.testing.assert_allclose(found[0], totals, atol=1e-5)
        np.testing.assert_allclose(found[1], logprobs, atol=1e-5)
    front = next(iter(pools.shared.values())).front
    counts = ray.get(front.counts.remote())
    assert counts["calls"] == 12
    assert counts["batches"] <= 12


def test_a_worker_that_dies_is_replaced_and_asked_again(pools: TrialPools) -> None:
    front = next(iter(pools.shared.values())).front
    whole = sequences()
    before = answers(pools, whole, ask(pools, whole))
    for role in ("reward", "reference"):
        ray.kill(ray.get(front.workers.remote(role))[0])
    after = answers(pools, whole, ask(pools, whole))
    np.testing.assert_allclose(after[0], before[0], atol=1e-5)
    np.testing.assert_allclose(after[1], before[1], atol=1e-5)


def test_what_a_role_refuses_is_told_before_any_trial(ray_session, base, tmp_path) -> None:
    config = ppo_config(
        tmp_path, base, *SMALL[1:], "reward.score_weight=1.0", f"reward.model={base}"
    )
    with pytest.raises(ConfigError):
        start_front(config, num_callers=1)

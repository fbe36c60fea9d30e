"""Calls of several trials that are answered together return what single calls return."""

from functools import partial

import numpy as np
import pytest
import torch

from medgpt.engine.setup import ensure_process_group
from medgpt.rlhf.rewards.weighted_sum import reward_metrics
from medgpt.rlhf.roles.reference import Reference
from medgpt.rlhf.roles.reward import Reward
from medgpt.rlhf.rollout_batch import Prompts, join_per_sequence, join_per_token
from medgpt.tune import batched_calls
from tests.rlhf.cases import ppo_config, sequences, share

RULES = 'reward.functions=[{name="letters",path="tests.tune.cases:letters"}]'
BATCHES = [sequences(12, seed=1), sequences(5, seed=2), sequences(8, seed=3, longest=3)]


def prompts(batch) -> Prompts:
    return Prompts(
        sample_ids=batch.sample_ids,
        ids=batch.prompts,
        messages=['[["user", "?"]]'] * len(batch),
    )


def rollouts(batch) -> list:
    """Split the batch between two rollout workers."""
    return [share(batch, range(0, len(batch), 2)), share(batch, range(1, len(batch), 2))]


def flat(requests: list[list]) -> tuple:
    """Flatten requests as SharedPoolsActor sends them."""
    return [len(request) for request in requests], *(arg for request in requests for arg in request)


@pytest.fixture(scope="module")
def config(base, tmp_path_factory):
    ensure_process_group(torch.device("cpu"))  # of this process alone
    return ppo_config(tmp_path_factory.mktemp("batched"), base, RULES)


def test_batched_scores_equal_those_of_single_calls(config):
    role = Reward(config)
    requests = [[prompts(batch), *rollouts(batch)] for batch in BATCHES]
    together = batched_calls.score(role, *flat(requests))
    for batched, request in zip(together, requests, strict=True):
        alone = role.score(*request)
        np.testing.assert_array_equal(
            join_per_sequence([(batched.index, batched.totals)]),
            join_per_sequence([(alone.index, alone.totals)]),
        )
        assert reward_metrics([batched.rewards]) == pytest.approx(reward_metrics([alone.rewards]))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_batched_logprobs_equal_those_of_single_calls(config, temperature):
    role = Reference(config)
    requests = [rollouts(batch) for batch in BATCHES]
    call = partial(batched_calls.logprobs, role, temperature)
    together = call(*flat(requests))
    for batched, request, batch in zip(together, requests, BATCHES, strict=True):
        alone = role.logprobs(temperature, *request)
        np.testing.assert_allclose(
            join_per_token([batched], batch.responses),
            join_per_token([alone], batch.responses),
            atol=1e-5,
        )
        assert batched.entropy == alone.entropy


def test_a_rank_may_hold_no_row_of_a_trial():
    index = np.array([0, 3, 7])  # of a rank, where three batches have 4, 2 and 3 rows
    shares = batched_calls._rows_by_batch(index, [sequences(4), sequences(2), sequences(3)])
    assert [(batch_index.tolist(), rows.tolist()) for batch_index, rows in shares] == [
        ([0, 3], [0, 1]),
        ([], []),
        ([1], [2]),
    ]

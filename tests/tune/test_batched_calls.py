"""Trials that are answered together get what each would have got alone."""

from functools import partial

import numpy as np
import pytest
import torch

from medgpt.engine.setup import join_process_group
from medgpt.rlhf.rewards.total import reward_metrics
from medgpt.rlhf.roles.reference import Reference
from medgpt.rlhf.roles.reward import Reward
from medgpt.rlhf.rollout_batch import Prompts, join_rows, join_tokens
from medgpt.tune import batched_calls
from tests.rlhf.cases import ppo_config, sequences, share

RULES = 'reward.functions=[{name="letters",path="tests.tune.cases:letters"}]'
BATCHES = [sequences(12, seed=1), sequences(5, seed=2), sequences(8, seed=3, longest=3)]


def prompts(whole) -> Prompts:
    return Prompts(
        sample_ids=whole.sample_ids,
        ids=whole.prompts,
        messages=['[["user", "?"]]'] * len(whole),
    )


def parts(whole) -> list:
    """As two rollout workers would have sampled it."""
    return [share(whole, range(0, len(whole), 2)), share(whole, range(1, len(whole), 2))]


def flat(requests: list[list]) -> tuple:
    """As a front sends them."""
    return [len(request) for request in requests], *(arg for request in requests for arg in request)


@pytest.fixture(scope="module")
def config(base, tmp_path_factory):
    join_process_group(torch.device("cpu"))  # of this process alone
    return ppo_config(tmp_path_factory.mktemp("frozen"), base, RULES)


def test_scores_together_are_those_alone(config):
    role = Reward(config)
    requests = [[prompts(whole), *parts(whole)] for whole in BATCHES]
    together = batched_calls.score(role, *flat(requests))
    for found, request in zip(together, requests, strict=True):
        alone = role.score(*request)
        np.testing.assert_array_equal(
            join_rows([found.index], [found.totals]), join_rows([alone.index], [alone.totals])
        )
        assert reward_metrics([found.rewarded]) == pytest.approx(reward_metrics([alone.rewarded]))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_together_are_those_alone(config, temperature):
    role = Reference(config)
    requests = [parts(whole) for whole in BATCHES]
    ask = partial(batched_calls.logprobs, role, temperature=temperature)
    together = ask(*flat(requests))
    for found, request, whole in zip(together, requests, BATCHES, strict=True):
        alone = role.logprobs(temperature, *request)
        np.testing.assert_allclose(
            join_tokens([found], whole.responses), join_tokens([alone], whole.responses), atol=1e-5
        )
        assert (found.of, found.entropy) == ("reference", alone.entropy)


def test_a_rank_may_have_no_row_of_a_trial():
    index = np.array([0, 3, 7])  # of a rank, where three batches have 4, 2 and 3 rows
    shares = batched_calls._shares(index, [sequences(4), sequences(2), sequences(3)])
    assert [(mine.tolist(), rows.tolist()) for mine, rows in shares] == [
        ([0, 3], [0, 1]),
        ([], []),
        ([1], [2]),
    ]

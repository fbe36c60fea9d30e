"""Rollouts depend on prompt, iteration and weights, and on nothing else."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist

from medgpt.config.base import ConfigError
from medgpt.models.decode import TokenGenerator
from medgpt.rlhf.roles.rollout import HuggingFaceEngine, Rollout, StaleWeights
from medgpt.rlhf.rollout_batch import (
    NO_VERSION,
    Prompts,
    Ragged,
    Sequences,
    join_sequences,
    sample_seeds,
)
from tests.rlhf.cases import ppo_config


@contextmanager
def rank_of(rank: int, world_size: int) -> Iterator[None]:
    """Make this process look like one rank of several; generation needs no communication."""
    with (
        patch.object(dist, "get_rank", lambda: rank),
        patch.object(dist, "get_world_size", lambda: world_size),
    ):
        yield


@pytest.fixture(scope="module")
def rollout(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Rollout:
    return Rollout(ppo_config(tmp_path_factory.mktemp("rollout"), base))


def prompts(num: int = 9) -> Prompts:
    rng = np.random.default_rng(4)
    rows = [rng.integers(5, 300, 3 + 4 * i) for i in range(num)]
    ids = [f"sample-{i}" for i in range(num)]
    return Prompts(sample_ids=ids, ids=Ragged.from_rows(rows, np.int32), messages=["[]"] * num)


def generate(rollout: Rollout, *, ranks: int = 1, iteration: int = 0) -> Sequences:
    """Joined responses of all ranks."""
    parts = []
    for rank in range(ranks):
        with rank_of(rank, ranks):
            parts.append(rollout.generate(prompts(), iteration))
    assert all(len(part) for part in parts)
    return join_sequences(parts)


def test_answers_do_not_depend_on_the_number_of_workers(rollout: Rollout):
    one, three = generate(rollout), generate(rollout, ranks=3)
    assert one.sample_ids == three.sample_ids == prompts().sample_ids
    assert np.array_equal(one.responses.values, three.responses.values)
    assert np.allclose(one.logprobs, three.logprobs, atol=1e-5)
    assert np.array_equal(one.prompts.values, prompts().ids.values)


def test_every_iteration_and_every_sample_has_its_own_noise(rollout: Rollout):
    first, same, second = (generate(rollout, iteration=i) for i in (0, 0, 1))
    assert np.array_equal(first.responses.values, same.responses.values)
    assert not np.array_equal(first.responses.values, second.responses.values)


def test_a_sample_that_a_batch_has_twice_gets_two_answers(rollout: Rollout):
    once = prompts(3)
    twice = Prompts(
        sample_ids=[*once.sample_ids, once.sample_ids[2]],
        ids=once.ids.take([0, 1, 2, 2]),
        messages=["[]"] * 4,
    )
    with rank_of(0, 1):
        single, repeated = rollout.generate(once, 0), rollout.generate(twice, 0)
    rows = [repeated.responses.row(i).tolist() for i in range(4)]
    assert rows[:3] == [single.responses.row(i).tolist() for i in range(3)]
    assert rows[3] != rows[2]
    assert len(set(sample_seeds(0, 0, ["a"] * 9 + ["a1", "b"]))) == 11


def test_stale_weights_are_refused_before_anything_is_sampled(rollout: Rollout):
    with rank_of(1, 2), pytest.raises(StaleWeights, match=r"rank 1 has no full version .* 4;"):
        rollout.generate(prompts(), 0, 4)
    rollout.weight_version = 3
    with rank_of(1, 2), pytest.raises(StaleWeights, match=r"rank 1 has version 3 of .* version 4;"):
        rollout.generate(prompts(), 0, 4)
    with rank_of(0, 1):
        assert rollout.generate(prompts(), 0, 3).weight_version == 3
    rollout.weight_version = NO_VERSION


def test_rollouts_use_the_weights_received_last(rollout: Rollout):
    assert isinstance(rollout.engine, HuggingFaceEngine)
    model = rollout.engine.model
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    assert "lm_head.weight" not in before  # tied: sent once
    rollout.load_weights(before.items())
    rollout.weights_loaded(3)
    first = generate(rollout)
    new = [(name, weight + 0.05 * torch.randn_like(weight)) for name, weight in before.items()]
    rollout.load_weights(new[:2])
    assert rollout.weight_version == NO_VERSION  # half of them
    rollout.load_weights(new[2:])
    rollout.weights_loaded(4)
    second = generate(rollout)
    assert (first.weight_version, second.weight_version) == (3, 4)
    assert not np.array_equal(first.responses.values, second.responses.values)
    with torch.no_grad():
        ids = torch.from_numpy(np.append(second.prompts.row(0), second.responses.row(0))).long()
        expected = model(ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    length = second.responses.lengths[0]
    assert np.allclose(second.logprobs[:length], expected[-length:], atol=1e-4)
    rollout.load_weights(new[1:])
    with pytest.raises(ValueError, match=r"1 weights are missing, such as model\.embed_tokens"):
        rollout.weights_loaded(5)
    assert rollout.weight_version == NO_VERSION
    rollout.load_weights(before.items())
    rollout.weights_loaded(3)


def test_offloading_and_onloading_changes_no_sample(rollout: Rollout):
    before = generate(rollout)
    rollout.offload()
    rollout.onload()
    after = generate(rollout)
    assert np.array_equal(before.responses.values, after.responses.values)
    assert np.array_equal(before.logprobs, after.logprobs)


def test_a_worker_without_prompts_returns_an_empty_share(rollout: Rollout):
    few = prompts(2)
    with rank_of(2, 3):
        part = rollout.generate(few, 0)
    assert len(part) == len(part.logprobs) == 0
    parts = []
    for rank in range(3):
        with rank_of(rank, 3):
            parts.append(rollout.generate(few, 0))
    assert join_sequences(parts).sample_ids == few.sample_ids


def test_generate_greedy_decodes_at_temperature_0(rollout: Rollout):
    with rank_of(0, 1):
        repeated = rollout.generate_greedy(prompts().ids, 5)
    assert isinstance(rollout.engine, HuggingFaceEngine)
    rows = [prompts().ids.row(i).tolist() for i in range(9)]
    expected = TokenGenerator(rollout.engine.model).generate(  # pyright: ignore[reportArgumentType]
        rows, [1] * 9, max_new_tokens=5, temperature=0.0, stop_token_ids=rollout.stop_ids
    )
    assert [repeated.responses.row(i).tolist() for i in range(9)] == [row.ids for row in expected]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="there is vLLM here")
def test_an_engine_that_is_not_installed_is_named(tmp_path: Path, base: Path):
    with pytest.raises(ConfigError, match=r"rollout\.engine=vllm needs the package vllm"):
        Rollout(ppo_config(tmp_path, base, "rollout.engine=vllm"))

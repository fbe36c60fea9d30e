"""The reference says what the SFT model says, whole or partitioned, on any number of ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from medgpt.rlhf.experience import join_tokens
from medgpt.rlhf.roles.reference import Reference
from tests.rlhf.cases import ppo_config, sequences
from tests.rlhf.test_actor import gathered, response_logprobs


def whole_logprobs(folder: Path, base: Path, *overrides: str) -> np.ndarray:
    """(N,) of all ranks, in the order of the batch."""
    config = ppo_config(folder, base, "rollout.temperature=0.7", *overrides)
    whole, reference = sequences(), Reference(config)
    parts = gathered(reference.logprobs(whole))
    assert {part.of for part in parts} == {"reference"}
    return join_tokens(parts, whole.responses)


@pytest.fixture(scope="module")
def expected(base: Path) -> np.ndarray:
    model, whole = AutoModelForCausalLM.from_pretrained(base).eval(), sequences()
    with torch.no_grad():
        return torch.cat(
            [response_logprobs(model, whole, row, 0.7) for row in range(len(whole))]
        ).numpy()


@pytest.mark.parametrize("stage", [0, 3])
def test_the_reference_is_the_model_it_was_given(base, tmp_path, two_ranks, expected, stage):
    override = f"pools.reference.zero_stage={stage}"
    alone = whole_logprobs(tmp_path, base, override)
    np.testing.assert_allclose(alone, expected, atol=1e-5)
    for found in two_ranks(whole_logprobs, tmp_path, base, override):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_reference_in_bf16_is_near(base, tmp_path, expected):
    found = whole_logprobs(tmp_path, base, "pools.reference.precision=bf16")
    assert 1e-6 < np.abs(found - expected).max() < 0.1

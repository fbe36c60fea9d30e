"""The reference role: the first policy's log-probabilities, whatever the ranks and ZeRO stage."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from medgpt.engine.setup import join_process_group
from medgpt.rlhf.roles.reference import Reference
from medgpt.rlhf.rollout_batch import join_tokens
from tests.engine.cases import CPU
from tests.rlhf.cases import ppo_config, sequences
from tests.rlhf.test_actor import gathered, response_logprobs

COLD = "rollout.temperature=0.7"


def all_logprobs(folder: Path, base: Path, *overrides: str) -> np.ndarray:
    """(N,) of this process's ranks together."""
    whole = sequences()
    part = Reference(ppo_config(folder, base, COLD, *overrides)).logprobs(0.7, whole)
    return join_tokens(gathered(part), whole.responses)


def alone(base: Path) -> np.ndarray:
    whole = sequences()
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa").eval()
    with torch.no_grad():
        rows = [response_logprobs(model, whole, row, 0.7) for row in range(len(whole))]
    return torch.cat(rows).numpy()


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("budget", [1, 48])
def test_ranks_and_zero_stages_change_nothing(base, tmp_path, two_ranks, stage, budget):
    options = (f"pools.reference.zero_stage={stage}", f"ppo.micro_batch_tokens={budget}")
    one, other = two_ranks(all_logprobs, tmp_path, base, *options)
    np.testing.assert_allclose(one, alone(base), atol=1e-5)
    np.testing.assert_array_equal(one, other)


def test_offloaded_and_back_the_numbers_are_the_same(base, tmp_path):
    join_process_group(CPU)
    reference, whole = Reference(ppo_config(tmp_path, base)), sequences()
    before = reference.logprobs(1.0, whole).values
    reference.offload()
    reference.onload()
    np.testing.assert_array_equal(reference.logprobs(1.0, whole).values, before)


def test_a_reference_in_bf16_is_near(base, tmp_path):
    join_process_group(CPU)
    found = all_logprobs(tmp_path, base, "pools.reference.precision=bf16")
    assert 1e-6 < np.abs(found - alone(base)).max() < 0.1

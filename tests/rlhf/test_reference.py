"""The reference role: the first policy's log-probabilities, whatever the ranks and ZeRO stage."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from medgpt.engine.setup import ensure_process_group
from medgpt.rlhf.roles.reference import Reference
from medgpt.rlhf.rollout_batch import join_per_token
from tests.engine.cases import CPU
from tests.rlhf.cases import ppo_config, sequences
from tests.rlhf.test_actor import gathered, response_logprobs

COLD = "rollout.temperature=0.7"


def all_logprobs(folder: Path, base: Path, *overrides: str) -> np.ndarray:
    """(N,) log-probabilities gathered from all ranks."""
    rollouts = sequences()
    part = Reference(ppo_config(folder, base, COLD, *overrides)).logprobs(0.7, rollouts)
    return join_per_token(gathered(part), rollouts.responses)


def alone(base: Path) -> np.ndarray:
    rollouts = sequences()
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa").eval()
    with torch.no_grad():
        rows = [response_logprobs(model, rollouts, row, 0.7) for row in range(len(rollouts))]
    return torch.cat(rows).numpy()


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("budget", [1, 48])
def test_ranks_and_zero_stages_change_nothing(base, tmp_path, two_ranks, stage, budget):
    options = (f"pools.reference.zero_stage={stage}", f"ppo.micro_batch_tokens={budget}")
    one, other = two_ranks(all_logprobs, tmp_path, base, *options)
    np.testing.assert_allclose(one, alone(base), atol=1e-5)
    np.testing.assert_array_equal(one, other)


def test_offloading_and_onloading_changes_no_number(base, tmp_path):
    ensure_process_group(CPU)
    reference, rollouts = Reference(ppo_config(tmp_path, base)), sequences()
    before = reference.logprobs(1.0, rollouts).values
    reference.offload()
    reference.onload()
    np.testing.assert_array_equal(reference.logprobs(1.0, rollouts).values, before)


def test_a_reference_in_bf16_is_near(base, tmp_path):
    ensure_process_group(CPU)
    low_precision = all_logprobs(tmp_path, base, "pools.reference.precision=bf16")
    assert 1e-6 < np.abs(low_precision - alone(base)).max() < 0.1

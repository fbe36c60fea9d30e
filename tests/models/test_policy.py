"""The policy's log-probabilities and entropies equal those of the model's logits."""

import pytest
import torch

from medgpt.data.loader.collate import empty_batch
from medgpt.models.policy import Policy
from tests.models.tiny_models import random_batch, tiny_model


@pytest.mark.parametrize("chunk", [8192, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_terms_of_packed_sequences_equal_those_of_each_sequence_alone(chunk, temperature):
    policy = Policy(tiny_model(), loss_chunk_tokens=chunk)
    batch = random_batch([5, 9, 1, 12])

    with torch.no_grad():
        found = policy(batch, temperature=temperature, with_entropy=True)
        policy.pretrained.set_attn_implementation("sdpa")
        logits = [
            policy.pretrained(input_ids=batch.input_ids[:, start:stop]).logits[0]
            for start, stop in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)
        ]
    logp = (torch.cat(logits) / temperature).log_softmax(-1)
    counts = batch.labels[0] >= 0
    picked = logp[counts].gather(1, batch.labels[0, counts][:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)[counts]

    torch.testing.assert_close(found, torch.stack([picked, entropy]), atol=1e-5, rtol=1e-5)


def test_a_batch_without_labels_is_zero_and_reaches_every_weight():
    policy = Policy(tiny_model())
    terms = policy(empty_batch(0), with_entropy=True)
    (terms.sum() * 0).backward()

    assert terms.eq(0).all()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in policy.parameters())

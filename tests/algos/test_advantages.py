"""Rewards, GAE and whitening against hand-computed values and definitions, with nan in padding."""

import math

import pytest
import torch
from torch import Tensor

from medgpt.algos.advantages import gae, token_rewards, whiten

NAN = float("nan")
LENGTHS = torch.tensor([4, 1, 0, 3])
MASK = torch.arange(4) < LENGTHS[:, None]  # (4, 4)


def padded(x: Tensor, fill: float) -> Tensor:
    return torch.where(MASK, x, fill)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rewards_by_hand():
    kl = torch.tensor([[1.0, 2.0, NAN], [4.0, NAN, NAN], [NAN, NAN, NAN]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])

    found = token_rewards(
        torch.tensor([3.0, -9.0, 7.0]), kl, mask, kl_coef=0.5, score_clip=5.0
    ).tolist()

    assert found == [[-0.5, 2.0, 0.0], [-7.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_a_score_is_paid_once_on_the_last_token_even_if_the_mask_has_holes():
    mask = torch.tensor([[True, False, True, False], [False, True, True, True]])
    found = token_rewards(torch.tensor([3.0, 5.0]), torch.ones(2, 4), mask, kl_coef=0.5)
    assert found.tolist() == [[-0.5, 0.0, 2.5, 0.0], [0.0, -0.5, -0.5, 4.5]]


def test_rows_without_tokens_are_zero():
    none = torch.zeros(3, 0)
    rewards = token_rewards(torch.ones(3), none, none.bool(), kl_coef=0.5)
    found = gae(rewards, none, none.bool(), gamma=1.0, gae_lambda=0.95)
    assert rewards.shape == found.advantages.shape == found.returns.shape == (3, 0)


def test_gae_by_hand():
    """gamma 0.5, lambda 0.5: deltas 1 + 1 - 4 = -2, then 3 - 2 = 1; advantages -2 + 1 / 4, 1."""
    found = gae(
        torch.tensor([[1.0, 3.0, NAN]]),
        torch.tensor([[4.0, 2.0, NAN]]),
        torch.tensor([[True, True, False]]),
        gamma=0.5,
        gae_lambda=0.5,
    )
    assert found.advantages.tolist() == [[-1.75, 1.0, 0.0]]
    assert found.returns.tolist() == [[2.25, 3.0, 0.0]]


def test_a_truncated_response_can_bootstrap_from_the_critic():
    """The last delta grows by gamma * 8 = 4, the one before by a quarter of that."""
    found = gae(
        torch.tensor([[1.0, 3.0, NAN]]),
        torch.tensor([[4.0, 2.0, NAN]]),
        torch.tensor([[True, True, False]]),
        gamma=0.5,
        gae_lambda=0.5,
        bootstrap_values=torch.tensor([8.0]),
    )
    assert found.advantages.tolist() == [[-0.75, 5.0, 0.0]]


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.9, 0.0)])
@pytest.mark.parametrize("bootstrap", [None, random(4, seed=3)])
def test_gae_is_the_discounted_sum_of_the_errors_to_come(gamma, gae_lambda, bootstrap):
    rewards, values = random(4, 4, seed=1), random(4, 4, seed=2)

    found = gae(
        padded(rewards, NAN),
        padded(values, NAN),
        MASK,
        gamma=gamma,
        gae_lambda=gae_lambda,
        bootstrap_values=bootstrap,
    ).advantages

    for row, length in enumerate(LENGTHS.tolist()):
        end = 0.0 if bootstrap is None else bootstrap[row].item()
        after = [*values[row, 1:length].tolist(), end]
        deltas = [
            rewards[row, t].item() + gamma * after[t] - values[row, t].item() for t in range(length)
        ]
        for t in range(length):
            weights = [(gamma * gae_lambda) ** k for k in range(length - t)]
            want = sum(w * d for w, d in zip(weights, deltas[t:], strict=True))
            assert found[row, t].item() == pytest.approx(want, abs=1e-5)


def test_with_lambda_1_the_return_is_the_sum_of_rewards_whatever_the_critic_says():
    rewards = random(4, 4, seed=1)
    found = gae(rewards, random(4, 4, seed=2), MASK, gamma=1.0, gae_lambda=1.0).returns
    want = padded(rewards, 0.0).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(found, padded(want, 0.0))


def test_whitened_by_hand():
    x = torch.tensor([[1.0, 2.0, NAN], [3.0, NAN, NAN]])  # mean 2, unbiased variance 1
    mask = torch.tensor([[True, True, False], [True, False, False]])
    torch.testing.assert_close(
        whiten(x, mask), torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        whiten(x, mask, shift_mean=False),
        torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]]),
        atol=1e-6,
        rtol=0,
    )


def test_a_shard_whitened_by_the_whole_batchs_statistics_is_a_part_of_the_whole():
    x = random(4, 4)
    stats = x[MASK].mean(), x[MASK].var()
    shards = [whiten(x[rows], MASK[rows], stats=stats) for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(torch.cat(shards), whiten(x, MASK))


def test_whitening_a_single_token_is_finite():
    found = whiten(torch.tensor([[3.0, NAN]]), torch.tensor([[True, False]]))
    assert found.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("fill", [NAN, math.inf, 7.0])
@pytest.mark.parametrize("name", ["rewards", "gae", "whiten"])
def test_padding_reaches_neither_result_nor_gradient(name, fill):
    x, y, scores = random(4, 4, seed=1), random(4, 4, seed=2), random(4, seed=3)

    def outcome(fill: float) -> list[Tensor]:
        inputs = [padded(x, fill).requires_grad_(), padded(y, fill).requires_grad_()]
        rows = torch.where(LENGTHS > 0, scores, fill).requires_grad_()
        weights = random(4, 4, seed=4)
        match name:
            case "rewards":
                out = token_rewards(rows, inputs[0], MASK, kl_coef=0.1)
            case "gae":
                options = {"gamma": 0.9, "gae_lambda": 0.8, "bootstrap_values": rows}
                out = sum(gae(*inputs, MASK, **options))
            case _:
                out = whiten(inputs[0], MASK)
        assert out[~MASK].eq(0).all()
        tensors = [rows, *inputs]
        grads = torch.autograd.grad((out * weights).sum(), tensors, allow_unused=True)
        for tensor, grad in zip(tensors, grads, strict=True):
            if grad is not None and tensor.dim() == 2:
                assert grad[~MASK].eq(0).all()
        return [out, *(grad for grad in grads if grad is not None)]

    torch.testing.assert_close(outcome(fill), outcome(0.0))


def test_the_gradient_of_whitening_is_that_of_the_formula():
    x = random(4, 4).requires_grad_()
    weights = random(4, 4, seed=1)
    tokens = x[MASK]
    want = (tokens - tokens.mean()) / (tokens.var() + 1e-8).sqrt()
    (grad,) = torch.autograd.grad((want * weights[MASK]).sum(), x)
    (found,) = torch.autograd.grad((whiten(x, MASK) * weights).sum(), x)
    torch.testing.assert_close(found, grad)

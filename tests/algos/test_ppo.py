"""PPO's losses against hand-computed values and independent formulas, and their invariants."""

import math

import pytest
import torch
from torch import Tensor

from medgpt.algos.ppo import ppo_policy_loss, ppo_value_loss

NAN = float("nan")
LENGTHS = torch.tensor([5, 1, 0, 3, 4])
MASK = torch.arange(5) < LENGTHS[:, None]  # (5, 5)
NUM_TOKENS = int(MASK.sum())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one_token(ratio: float, advantage: float, **options) -> tuple[float, float, float]:
    """Return the loss, its gradient by the log-probability, and the clipped share."""
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    out = ppo_policy_loss(
        logprobs,
        torch.zeros(1, 1),
        torch.tensor([[advantage]]),
        torch.tensor([[True]]),
        **{"clip_range": 0.2, "num_tokens": 1, **options},
    )
    (grad,) = torch.autograd.grad(out.loss, logprobs)
    return out.loss.item(), grad.item(), out.clip_frac.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "options", "loss", "grad"),
    [
        pytest.param(1.0, 3.0, {}, -3.0, -3.0, id="on-policy"),
        pytest.param(2.0, 1.0, {}, -1.2, 0.0, id="good-and-up-is-clipped"),
        pytest.param(0.5, 1.0, {}, -0.5, -0.5, id="good-and-down-is-not"),
        pytest.param(0.5, -1.0, {}, 0.8, 0.0, id="bad-and-down-is-clipped"),
        pytest.param(2.0, -1.0, {}, 2.0, 2.0, id="bad-and-up-is-not"),
        pytest.param(1.25, 1.0, {"clip_range_high": 0.3}, -1.25, -1.25, id="below-the-higher-clip"),
        pytest.param(1.5, 1.0, {"clip_range_high": 0.3}, -1.3, 0.0, id="above-the-higher-clip"),
        pytest.param(0.5, -1.0, {"clip_range_high": 0.3}, 0.8, 0.0, id="the-lower-clip-stays"),
        pytest.param(2.0, -1.0, {"dual_clip": 3.0}, 2.0, 2.0, id="below-the-dual-clip"),
        pytest.param(4.0, -1.0, {"dual_clip": 3.0}, 3.0, 0.0, id="above-the-dual-clip"),
        pytest.param(4.0, 1.0, {"dual_clip": 3.0}, -1.2, 0.0, id="dual-clip-is-for-bad-ones"),
        pytest.param(
            1.1, 2.0, {"weights": torch.tensor([[0.5]])}, -1.1, -1.1, id="half-the-weight"
        ),
    ],
)
def test_one_token_by_hand(ratio, advantage, options, loss, grad):
    found_loss, found_grad, clipped = one_token(ratio, advantage, **options)
    assert found_loss == pytest.approx(loss)
    assert found_grad == pytest.approx(grad)
    assert clipped == (grad == 0.0)


def test_the_kl_to_the_old_policy_by_hand():
    """Ratios 2 and 1: (2 - 1 - log 2 + 0) / 2 tokens."""
    logprobs = torch.tensor([[math.log(2.0), 0.0, NAN]])
    out = ppo_policy_loss(
        logprobs,
        torch.zeros(1, 3),
        torch.zeros(1, 3),
        torch.tensor([[True, True, False]]),
        clip_range=0.2,
        num_tokens=2,
    )
    assert out.approx_kl.item() == pytest.approx((1 - math.log(2)) / 2)


def test_an_overflowing_ratio_makes_the_loss_infinite():
    out = ppo_policy_loss(
        torch.tensor([[0.0]]),
        torch.tensor([[-200.0]]),
        torch.tensor([[-1.0]]),
        torch.tensor([[True]]),
        clip_range=0.2,
        num_tokens=1,
    )
    assert out.loss.item() == math.inf


def test_policy_loss_and_gradient_follow_the_definition_token_by_token():
    logprobs = (0.5 * random(5, 5, seed=1)).requires_grad_()
    old, advantages = 0.5 * random(5, 5, seed=2), random(5, 5, seed=3)
    weights = random(5, 5, seed=4).abs()

    out = ppo_policy_loss(
        logprobs,
        old,
        advantages,
        MASK,
        clip_range=0.1,
        clip_range_high=0.3,
        dual_clip=1.5,
        weights=weights,
        num_tokens=NUM_TOKENS,
    )
    (grad,) = torch.autograd.grad(out.loss, logprobs)

    want = torch.zeros(())
    for row, t in MASK.nonzero().tolist():
        a = advantages[row, t]
        ratio = (logprobs[row, t] - old[row, t]).exp()
        bounded = ratio if 0.9 <= ratio <= 1.3 else torch.tensor(0.9 if ratio < 0.9 else 1.3)
        objective = min(ratio * a, bounded * a)
        objective = max(objective, 1.5 * a) if a < 0 else objective
        want = want - objective * weights[row, t] / NUM_TOKENS
    (want_grad,) = torch.autograd.grad(want, logprobs)
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(grad, want_grad)


@pytest.mark.parametrize(
    ("value", "clip_range", "loss", "grad", "clipped"),
    [
        pytest.param(1.1, 0.2, 0.5 * 0.9**2, -0.9, 0, id="near-the-old-value"),
        pytest.param(1.5, 0.2, 0.5 * 0.8**2, 0.0, 1, id="too-fast-towards-the-return"),
        pytest.param(0.5, 0.2, 0.5 * 1.5**2, -1.5, 0, id="away-from-the-return"),
        pytest.param(1.5, None, 0.5 * 0.5**2, -0.5, 0, id="without-clip"),
    ],
)
def test_one_value_by_hand(value, clip_range, loss, grad, clipped):
    """The old value is 1, the return 2."""
    values = torch.tensor([[value, NAN]], requires_grad=True)
    out = ppo_value_loss(
        values,
        torch.tensor([[1.0, NAN]]),
        torch.tensor([[2.0, NAN]]),
        torch.tensor([[True, False]]),
        clip_range=clip_range,
        num_tokens=1,
    )
    (found,) = torch.autograd.grad(out.loss, values)
    assert out.loss.item() == pytest.approx(loss)
    assert found.tolist() == [[pytest.approx(grad), 0.0]]
    assert out.clip_frac.item() == clipped


@pytest.mark.parametrize("name", ["policy", "value"])
def test_padding_reaches_neither_result_nor_gradient(name):
    x, y, z = (random(5, 5, seed=seed) for seed in range(3))

    def outcome(fill: float) -> list[Tensor]:
        inputs = [torch.where(MASK, t, fill).requires_grad_() for t in (x, y, z)]
        options = {"clip_range": 0.2, "num_tokens": NUM_TOKENS}
        if name == "policy":
            padded = torch.where(MASK, z.abs(), fill)
            out = ppo_policy_loss(*inputs, MASK, dual_clip=2.0, weights=padded, **options)
        else:
            out = ppo_value_loss(*inputs, MASK, **options)
        grads = torch.autograd.grad(out.loss, inputs)
        assert all(grad[~MASK].eq(0).all() for grad in grads)
        return [*out, *grads]

    for fill in (NAN, math.inf, 1e30):
        torch.testing.assert_close(outcome(fill), outcome(0.0))


@pytest.mark.parametrize("loss", [ppo_policy_loss, ppo_value_loss])
def test_shards_add_up_to_the_whole_batch(loss):
    batch = [random(5, 5, seed=seed) for seed in range(3)]

    def share(rows: slice) -> Tensor:
        parts = [x[rows] for x in (*batch, MASK)]
        return torch.stack(loss(*parts, clip_range=0.2, num_tokens=NUM_TOKENS))

    torch.testing.assert_close(share(slice(0, 2)) + share(slice(2, 5)), share(slice(0, 5)))

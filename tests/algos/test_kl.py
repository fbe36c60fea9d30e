"""KL estimates by hand and against the true divergence; the controller's steps by hand."""

import math

import pytest
import torch

from medgpt.algos.kl import AdaptiveKL, kl_estimate

LOG2 = math.log(2)


@pytest.mark.parametrize(
    ("estimator", "want"), [("k1", LOG2), ("k2", LOG2**2 / 2), ("k3", 0.5 - 1 + LOG2)]
)
def test_one_token_twice_as_likely_as_under_the_reference(estimator, want):
    found = kl_estimate(torch.tensor([[-1.0]]), torch.tensor([[-1.0 - LOG2]]), estimator)
    assert found.item() == pytest.approx(want)


@pytest.mark.parametrize(("estimator", "tolerance"), [("k1", 1e-6), ("k2", 2e-3), ("k3", 1e-6)])
def test_the_mean_over_the_policys_tokens_is_the_divergence(estimator, tolerance):
    torch.manual_seed(0)
    logp = torch.randn(50).log_softmax(0)
    logq = (logp + 0.1 * torch.randn(50)).log_softmax(0)
    divergence = (logp.exp() * (logp - logq)).sum()

    found = (logp.exp() * kl_estimate(logp[None], logq[None], estimator)[0]).sum()

    assert found.item() == pytest.approx(divergence.item(), abs=tolerance)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_k2_and_k3_are_never_negative_and_0_where_the_models_agree(estimator):
    d = torch.linspace(-4, 4, 81)[None]
    assert (kl_estimate(d, torch.zeros_like(d), estimator) >= 0).all()
    assert kl_estimate(d, d, estimator).eq(0).all()


@pytest.mark.parametrize(
    ("mean_kl", "coef"),
    [
        pytest.param(6.0, 0.1, id="on target"),
        pytest.param(6.6, 0.1 * (1 + 0.1 * 64 / 1000), id="a tenth above"),
        pytest.param(60.0, 0.1 * (1 + 0.2 * 64 / 1000), id="far above is clipped"),
        pytest.param(-5.0, 0.1 * (1 - 0.2 * 64 / 1000), id="far below is clipped"),
    ],
)
def test_the_coefficient_moves_with_the_error(mean_kl, coef):
    controller = AdaptiveKL(0.1, target=6.0, horizon=1000)
    controller.update(mean_kl, num_sequences=64)
    assert controller.coef == pytest.approx(coef)


def test_a_saved_controller_continues():
    first, second = AdaptiveKL(0.1, 6.0, 100), AdaptiveKL(0.5, 6.0, 100)
    first.update(9.0, 32)
    second.load_state_dict(first.state_dict())
    for controller in (first, second):
        controller.update(3.0, 32)
    assert first.coef == second.coef == pytest.approx(0.1 * (1 + 0.2 * 0.32) * (1 - 0.2 * 0.32))

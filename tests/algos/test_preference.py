"""The pairwise loss against hand-computed values, its gradient, masks and shards."""

import math

import pytest
import torch

from medgpt.algos.preference import pairwise_loss

NAN = float("nan")


def test_three_pairs_by_hand():
    chosen = torch.tensor([1.0, 0.0, 2.0], requires_grad=True)
    rejected = torch.tensor([0.0, 0.0, 5.0], requires_grad=True)

    loss, accuracy = pairwise_loss(chosen, rejected, num_pairs=4)
    loss.backward()

    by_hand = [math.log(1 + math.exp(-1)), math.log(2), math.log(1 + math.exp(3))]
    assert loss.item() == pytest.approx(sum(by_hand) / 4)
    assert accuracy.item() == pytest.approx(1 / 3)  # a tie counts as wrong
    # d/dx -log sigmoid(x) = -sigmoid(-x)
    slopes = torch.tensor([-1 / (1 + math.e), -0.5, -1 / (1 + math.exp(-3))]) / 4
    torch.testing.assert_close(chosen.grad, slopes)
    torch.testing.assert_close(rejected.grad, -slopes)


def test_margin_and_weights_by_hand():
    chosen, rejected = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0])

    loss, accuracy = pairwise_loss(
        chosen,
        rejected,
        num_pairs=2,
        margin=torch.tensor([1.0, 0.5]),
        weights=torch.tensor([1 / 3, 2.0]),
    )
    same = pairwise_loss(chosen, rejected, num_pairs=1, margin=1.0).loss

    assert loss.item() == pytest.approx((math.log(2) / 3 + 2 * math.log(1 + math.exp(-1.5))) / 2)
    assert same.item() == pytest.approx(math.log(2) + math.log(1 + math.exp(-1)))
    assert accuracy.item() == 1.0  # the margin does not affect accuracy


def test_shards_add_up_to_the_whole_batch():
    torch.manual_seed(0)
    chosen, rejected, weights = torch.randn(3, 7)

    whole = pairwise_loss(chosen, rejected, num_pairs=7, weights=weights).loss
    shards = [
        pairwise_loss(chosen[s], rejected[s], num_pairs=torch.tensor(7), weights=weights[s]).loss
        for s in (slice(0, 0), slice(0, 5), slice(5, 7))
    ]

    torch.testing.assert_close(sum(shards), whole)


def test_masked_pairs_count_neither_in_loss_nor_gradient_nor_accuracy():
    chosen = torch.tensor([2.0, NAN, math.inf], requires_grad=True)
    rejected = torch.tensor([1.0, 0.0, -math.inf], requires_grad=True)
    mask = torch.tensor([True, False, False])

    loss, accuracy = pairwise_loss(
        chosen, rejected, num_pairs=1, mask=mask, weights=torch.tensor([1.0, NAN, NAN])
    )
    loss.backward()

    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert accuracy.item() == 1.0
    assert chosen.grad[1:].tolist() == rejected.grad[1:].tolist() == [0.0, 0.0]


def test_no_pairs_at_all_give_zeros_that_are_connected():
    scores = torch.zeros(0, requires_grad=True)

    loss, accuracy = pairwise_loss(scores, scores, num_pairs=3)
    loss.backward()

    assert (loss.item(), accuracy.item()) == (0.0, 0.0)


def test_large_differences_stay_finite_and_half_precision_is_computed_in_float32():
    far = pairwise_loss(torch.tensor([-1e4]), torch.tensor([1e4]), num_pairs=1).loss
    half = pairwise_loss(torch.ones(1).bfloat16(), torch.zeros(1).bfloat16(), num_pairs=1).loss

    assert far.item() == pytest.approx(2e4)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(math.log(1 + math.exp(-1)))

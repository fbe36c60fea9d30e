"""Token log-probabilities against hand-computed values and torch's own gradient."""

import math

import pytest
import torch

from medgpt.algos import logprobs
from medgpt.algos.logprobs import IGNORE, label_logprobs, policy_terms, token_logprobs

NAN = float("nan")


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    """Process the logits in one block, and two rows at a time."""
    if request.param == "many blocks":
        rows = lambda logits: [slice(i, i + 2) for i in range(0, len(logits), 2)]  # noqa: E731
        monkeypatch.setattr(logprobs, "_blocks", rows)


def test_two_tokens_by_hand():
    logits = torch.tensor(
        [[[0.0, math.log(3.0)], [5.0, 5.0], [NAN, NAN]]]
    )  # p = 1/4, 3/4; 1/2, 1/2

    out = token_logprobs(logits, torch.tensor([[7, 1, 0]]))  # the first token is given

    assert out.tolist() == [pytest.approx([math.log(0.75), math.log(0.5)])]


def test_every_row_of_a_distribution_sums_to_one():
    logits = torch.randn(1, 5, 7) * 30

    total = sum(token_logprobs(logits, torch.full((1, 5), v)).exp() for v in range(7))

    torch.testing.assert_close(total, torch.ones(1, 4))


@pytest.mark.usefixtures("blocks")
def test_values_and_gradient_equal_log_softmax():
    torch.manual_seed(0)
    logits, tokens = torch.randn(3, 6, 11, requires_grad=True), torch.randint(11, (3, 6))
    weights = torch.randn(3, 5)  # different for each position

    out = token_logprobs(logits, tokens)
    want = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    (grad,) = torch.autograd.grad((out * weights).sum(), logits)
    (want_grad,) = torch.autograd.grad((want * weights).sum(), logits)

    torch.testing.assert_close(out, want)
    torch.testing.assert_close(grad, want_grad)


@pytest.mark.usefixtures("blocks")
def test_ignored_positions_are_exactly_zero_whatever_they_hold():
    logits = torch.randn(1, 5, 4)
    logits[0, [1, 4]] = NAN
    logits[0, 2] = float("inf")
    logits.requires_grad_()
    tokens = torch.tensor([[0, 2, IGNORE, 99, 3]])

    out = token_logprobs(logits, tokens, mask=torch.tensor([[True, True, False, True]]))
    out.sum().backward()

    assert (out[0] != 0).tolist() == [True, False, False, True]
    assert logits.grad[0].any(-1).tolist() == [True, False, False, True, False]
    assert logits.grad.isfinite().all()


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("overwrite", [False, True])
def test_label_logprobs_at_a_temperature_equal_the_definition(temperature, overwrite):
    torch.manual_seed(0)
    base = torch.randn(3, 5, 11) * 9
    base[1, 2, 3] = -math.inf
    base[0, 1] = NAN
    base.requires_grad_()
    labels, weights = torch.randint(4, 11, (3, 5)), torch.randn(3, 5)
    labels[0, 1] = labels[2, 4] = IGNORE

    out = label_logprobs(base * 1, labels, temperature=temperature, overwrite=overwrite)
    logp = (torch.where(labels[..., None] < 0, 0, base) / temperature).log_softmax(-1)
    want = logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels >= 0)
    (grad,) = torch.autograd.grad((out * weights).sum(), base)
    (want_grad,) = torch.autograd.grad((want * weights).sum(), base)

    torch.testing.assert_close(out, want)
    torch.testing.assert_close(grad, want_grad)


def test_overwritten_logits_are_not_differentiated_twice():
    logits = torch.randn(2, 5, requires_grad=True)
    out = label_logprobs(logits * 1, torch.tensor([0, 1]), overwrite=True).sum()
    out.backward(retain_graph=True)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("overwrite", [False, True])
def test_bf16_logits_give_fp32_accuracy_and_a_bf16_gradient(overwrite):
    torch.manual_seed(0)
    logits = torch.randn(1, 4, 1000).bfloat16().requires_grad_()
    labels = torch.randint(1000, (1, 4))

    out = label_logprobs(logits, labels, overwrite=overwrite)
    out.sum().backward()
    want = logits.detach().double().log_softmax(-1).gather(-1, labels[..., None])[..., 0]

    assert out.dtype == torch.float32
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)


def test_large_logits_do_not_overflow():
    out = label_logprobs(torch.tensor([[3e4, 0.0]]), torch.tensor([1]))

    assert out.item() == -3e4


def test_the_backward_keeps_only_the_logits_of_their_size():
    logits, kept = torch.randn(2, 9, 50).bfloat16().requires_grad_(), []

    def remember(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        token_logprobs(logits, torch.ones(2, 9, dtype=torch.int64))

    large = [tensor for tensor in kept if tensor.numel() >= 50]
    assert [tensor.data_ptr() for tensor in large] == [logits.data_ptr()]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_policy_terms_and_their_gradient_equal_the_definition(temperature):
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 11, requires_grad=True), torch.randint(11, (3, 5))
    labels[0, 1] = labels[2, 4] = IGNORE
    counts, weights = labels >= 0, torch.randn(2, 3, 5)

    out = policy_terms(logits, labels, temperature=temperature)
    logp = (logits / temperature).log_softmax(-1)
    want = logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * counts
    want_entropy = -(logp.exp() * logp).sum(-1) * counts

    torch.testing.assert_close(out.logprobs, want)
    torch.testing.assert_close(out.entropy, want_entropy)
    for weight in (weights, weights * torch.tensor([1.0, 0.0])[:, None, None]):
        found = (out.logprobs * weight[0] + out.entropy * weight[1]).sum()
        wanted = (want * weight[0] + want_entropy * weight[1]).sum()
        (grad,) = torch.autograd.grad(found, logits, retain_graph=True)
        (want_grad,) = torch.autograd.grad(wanted, logits, retain_graph=True)
        torch.testing.assert_close(grad, want_grad)


@pytest.mark.usefixtures("blocks")
def test_an_impossible_token_adds_nothing_to_the_entropy():
    """p = 1/4, 0, 3/4 has the entropy of 1/4, 3/4."""
    logits = torch.tensor([[[0.0, -math.inf, math.log(3.0)], [1.0, 2.0, -math.inf]]])
    without = torch.tensor([[[0.0, math.log(3.0)], [1.0, 2.0]]]).requires_grad_()
    logits.requires_grad_()

    out = policy_terms(logits, torch.tensor([[2, 0]]), temperature=0.01)
    want = policy_terms(without, torch.tensor([[1, 0]]), temperature=0.01)
    torch.testing.assert_close(tuple(out), tuple(want))
    (grad,) = torch.autograd.grad(out.logprobs.sum() + 9 * out.entropy.sum(), logits)
    (want_grad,) = torch.autograd.grad(want.logprobs.sum() + 9 * want.entropy.sum(), without)
    torch.testing.assert_close(grad[0, 0, [0, 2]], want_grad[0, 0])
    torch.testing.assert_close(grad[0, 1, [0, 1]], want_grad[0, 1])
    assert grad[0, 0, 1] == grad[0, 1, 2] == 0


def test_policy_terms_are_zero_without_a_label():
    logits = torch.full((1, 2, 3), NAN)
    logits[0, 1] = 0.0
    logits.requires_grad_()
    out = policy_terms(logits, torch.tensor([[IGNORE, 2]]))
    (grad,) = torch.autograd.grad(sum(out).sum(), logits)

    assert out.logprobs.tolist() == [[0.0, pytest.approx(-math.log(3))]]
    assert out.entropy.tolist() == [[0.0, pytest.approx(math.log(3))]]
    assert grad[0, 0].eq(0).all()
    assert grad[0, 1].tolist() == pytest.approx([-1 / 3, -1 / 3, 2 / 3])

"""Log-probabilities of given tokens, without a float32 copy of the logits.

Shapes: B sequences, L tokens, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
FINITE = -1e30  # in place of a logit of -inf, where 0 * -inf would be nan


def token_logprobs(logits: Tensor, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """(B, L-1) float32: log p(tokens[:, 1:] | what comes before), in nats.

    Args:
        logits: (B, L, V), position i predicts token i + 1.
        tokens: (B, L) int64. A negative token (IGNORE) yields exactly 0.
        mask: (B, L-1) bool, False yields exactly 0. There logits and tokens may hold anything.
    """
    targets = tokens[:, 1:]
    if mask is not None:
        targets = torch.where(mask, targets, IGNORE)
    # the last position predicts nothing; ignoring it is cheaper than a copy of all logits but it
    return label_logprobs(logits, F.pad(targets, (0, 1), value=IGNORE))[:, :-1]


def label_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """(...) float32: log p(label), in nats; exactly 0, and so its gradient, for negative labels.

    Args:
        logits: (..., V) of any floating dtype.
        labels: (...) int64, what each position must predict.
    """
    flat = _LabelLogprobs.apply(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
    return flat.view(labels.shape)


class _LabelLogprobs(torch.autograd.Function):
    """x[label] - logsumexp(x), whose gradient is onehot(label) - softmax(x).

    The backward pass recomputes the softmax block by block: nothing of the logits' size is kept
    but the logits. Blocks that fit the cache also make it faster than cross_entropy on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:  # (M, V), (M,) -> (M,)
        log_z = torch.empty(len(labels), dtype=torch.float32, device=logits.device)
        for rows in _blocks(logits):
            log_z[rows] = logits[rows].float().logsumexp(-1)
        picked = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0].float()
        ctx.save_for_backward(logits, labels, log_z)
        # where, not multiply: 0 * nan is nan
        return torch.where(labels >= 0, picked - log_z, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # (M,) -> (M, V)
        logits, labels, log_z = ctx.saved_tensors
        index, ignored = labels.clamp(min=0)[:, None], labels[:, None] < 0
        scale = grads[0][:, None]
        any_ignored = bool(ignored.any())
        grad = torch.empty_like(logits)
        for rows in _blocks(logits):
            block = grad[rows] if grad.dtype == torch.float32 else grad[rows].float()
            torch.sub(logits[rows], log_z[rows, None], out=block).exp_().mul_(-scale[rows])
            block.scatter_add_(1, index[rows], scale[rows])
            if any_ignored:
                block.masked_fill_(ignored[rows], 0.0)
            if grad.dtype != torch.float32:
                grad[rows] = block
        return grad, None


class PolicyTerms(NamedTuple):
    logprobs: Tensor  # (...) float32, of the labels, in nats
    entropy: Tensor  # (...) float32, of the distributions, in nats; 0 unless asked for


def policy_terms(
    logits: Tensor, labels: Tensor, *, temperature: float = 1.0, with_entropy: bool = False
) -> PolicyTerms:
    """What PPO needs of the distribution softmax(logits / temperature) at each position.

    Both terms, and their gradients, are exactly 0 for negative labels.

    Args:
        logits: (..., V) of any floating dtype.
        labels: (...) int64, the tokens that were sampled.
        with_entropy: costs as much again.
    """
    flat = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    logprobs, entropy = _PolicyTerms.apply(*flat, temperature, with_entropy)
    return PolicyTerms(logprobs.view(labels.shape), entropy.view(labels.shape))


class _PolicyTerms(torch.autograd.Function):
    """With z = x / temperature, p = softmax(z), H = -sum p log p: the gradient by z of log p[label]
    is onehot(label) - p, of H it is -p (log p + H). Memory as in _LabelLogprobs.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:  # (M, V), (M,) -> (M,), (M,)
        log_z = torch.empty(len(labels), dtype=torch.float32, device=logits.device)
        entropy = torch.zeros_like(log_z)
        for rows in _blocks(logits):
            # logsumexp(x / temperature), the division in the pass that subtracts the largest
            x = logits[rows].float()
            top = x.amax(-1) / temperature
            z = torch.add(-top[:, None], x, alpha=1 / temperature)
            p = z.exp() if with_entropy else z.exp_()
            total = p.sum(-1)
            log_z[rows] = top + total.log()
            if with_entropy:
                entropy[rows] = total.log() - p.mul_(z.clamp_(min=FINITE)).sum(-1) / total
        picked = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0].float() / temperature
        ctx.save_for_backward(logits, labels, log_z, entropy)
        ctx.temperature = temperature
        counts = labels >= 0
        return torch.where(counts, picked - log_z, 0.0), torch.where(counts, entropy, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits, labels, log_z, entropy = ctx.saved_tensors
        ignored = labels < 0
        index = labels.clamp(min=0)[:, None]
        by_logprob, by_entropy = (torch.where(ignored, 0.0, g)[:, None] for g in grads)
        has_entropy, any_ignored = bool(by_entropy.any()), bool(ignored.any())
        grad = torch.empty_like(logits)
        for rows in _blocks(logits):
            # in place: a pass over the logits costs more than what is computed in it
            block = grad[rows] if grad.dtype == torch.float32 else grad[rows].float()
            x = logits[rows].float()
            torch.add(-log_z[rows, None], x, alpha=1 / ctx.temperature, out=block)
            scale = by_logprob[rows] / -ctx.temperature
            if has_entropy:
                block.clamp_(min=FINITE)
                by_h = by_entropy[rows] / ctx.temperature
                scale = scale - by_h * (block + entropy[rows, None])
            block.exp_().mul_(scale)
            block.scatter_add_(1, index[rows], by_logprob[rows] / ctx.temperature)
            if any_ignored:
                block.masked_fill_(ignored[rows, None], 0.0)
            if grad.dtype != torch.float32:
                grad[rows] = block
        return grad, None, None, None


def _blocks(logits: Tensor) -> list[slice]:
    elements = 2**19 if logits.device.type == "cpu" else 2**25
    size = max(1, elements // logits.shape[1])
    return [slice(start, start + size) for start in range(0, logits.shape[0], size)]

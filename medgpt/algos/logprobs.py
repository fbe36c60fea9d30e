"""Log-probabilities of given tokens, without a float32 copy of the logits.

Shapes: B sequences, L tokens, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
FINITE = -1e30  # replaces logits of -inf, as 0 * -inf would be nan


def token_logprobs(logits: Tensor, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return (B, L-1) float32: log p(tokens[:, 1:] | preceding tokens), in nats.

    Args:
        logits: (B, L, V), position i predicts token i + 1.
        tokens: (B, L) int64. A negative token (IGNORE) yields exactly 0.
        mask: (B, L-1) bool, False yields exactly 0; logits and tokens may hold anything there.
    """
    targets = tokens[:, 1:]
    if mask is not None:
        targets = torch.where(mask, targets, IGNORE)
    # the last position predicts nothing; ignoring it is cheaper than copying the other logits
    return label_logprobs(logits, F.pad(targets, (0, 1), value=IGNORE))[:, :-1]


def label_logprobs(
    logits: Tensor, labels: Tensor, *, temperature: float = 1.0, overwrite: bool = False
) -> Tensor:
    """Return (...) float32: log p(label) of softmax(logits / temperature), in nats.

    For negative labels, the result and its gradient are exactly 0.

    Args:
        logits: (..., V) of any floating dtype.
        labels: (...) int64, the token that each position predicts.
        overwrite: float32 logits are not read afterwards, so their memory is reused for what the
            backward pass needs, and then for their gradient; a second backward pass fails.
    """
    flat = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    logprobs = _LabelLogprobs.apply(*flat, temperature, overwrite and logits.dtype == torch.float32)
    return logprobs.view(labels.shape)


class _LabelLogprobs(torch.autograd.Function):
    """z[label] - logsumexp(z) with z = x / temperature; the gradient by z is onehot(label) -
    softmax(z).

    Keeps no other tensor of the logits' size than the logits, or exp(z - max z) in their place: the
    backward pass reads the softmax from there, or recomputes it block by block. Blocks that fit the
    cache also make it faster than cross_entropy on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, temperature: float, in_place: bool
    ) -> Tensor:  # (M, V), (M,) -> (M,)
        log_z = torch.empty(len(labels), dtype=torch.float32, device=logits.device)
        total = torch.empty_like(log_z)
        picked = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0].float() / temperature
        for rows in _blocks(logits):
            # divides in the same pass that subtracts the maximum
            x = logits[rows].float()
            top = x.amax(-1) / temperature
            out = x if in_place else None
            torch.sum(_shifted(x, top, temperature, out=out).exp_(), -1, out=total[rows])
            log_z[rows] = top + total[rows].log()
        ctx.save_for_backward(logits, labels, total if in_place else log_z)
        ctx.temperature, ctx.in_place = temperature, in_place
        # where, not multiply: 0 * nan is nan
        return torch.where(labels >= 0, picked - log_z, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:  # (M,) -> (M, V)
        logits, labels, kept = ctx.saved_tensors
        index, ignored = labels.clamp(min=0)[:, None], labels[:, None] < 0
        scale = torch.where(ignored, 0.0, grads[0][:, None]) / ctx.temperature
        any_ignored = bool(ignored.any())
        grad = logits if ctx.in_place else torch.empty_like(logits)
        for rows in _blocks(logits):
            if ctx.in_place:
                block = grad[rows].mul_(scale[rows] / -kept[rows, None])
            else:
                block = grad[rows] if grad.dtype == torch.float32 else grad[rows].float()
                _shifted(logits[rows].float(), kept[rows], ctx.temperature, out=block)
                block.exp_().mul_(-scale[rows])
            block.scatter_add_(1, index[rows], scale[rows])
            if any_ignored:
                block.masked_fill_(ignored[rows], 0.0)
            if grad.dtype != torch.float32:
                grad[rows] = block
        return grad, None, None, None


class PolicyTerms(NamedTuple):
    logprobs: Tensor  # (...) float32, of the labels, in nats
    entropy: Tensor  # (...) float32, of the distributions, in nats


def policy_terms(logits: Tensor, labels: Tensor, *, temperature: float = 1.0) -> PolicyTerms:
    """Return log p(label) and entropy of softmax(logits / temperature), for PPO's entropy bonus.

    Costs twice as much as `label_logprobs`. Both terms, and their gradients, are exactly 0 for
    negative labels.

    Args:
        logits: (..., V) of any floating dtype.
        labels: (...) int64, the tokens that were sampled.
    """
    flat = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    logprobs, entropy = _PolicyTerms.apply(*flat, temperature)
    return PolicyTerms(logprobs.view(labels.shape), entropy.view(labels.shape))


class _PolicyTerms(torch.autograd.Function):
    """With z = x / temperature, p = softmax(z), H = -sum p log p: the gradient by z of log p[label]
    is onehot(label) - p, of H it is -p (log p + H). Memory as in _LabelLogprobs.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:  # (M, V), (M,) -> (M,), (M,)
        log_z = torch.empty(len(labels), dtype=torch.float32, device=logits.device)
        entropy = torch.empty_like(log_z)
        for rows in _blocks(logits):
            x = logits[rows].float()
            top = x.amax(-1) / temperature
            z = _shifted(x, top, temperature)
            p = z.exp()
            total = p.sum(-1)
            log_z[rows] = top + total.log()
            entropy[rows] = total.log() - p.mul_(z.clamp_(min=FINITE)).sum(-1) / total
        picked = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0].float() / temperature
        ctx.save_for_backward(logits, labels, log_z, entropy)
        ctx.temperature = temperature
        counts = labels >= 0
        return torch.where(counts, picked - log_z, 0.0), torch.where(counts, entropy, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, log_z, entropy = ctx.saved_tensors
        ignored = labels[:, None] < 0
        index = labels.clamp(min=0)[:, None]
        by_logprob, by_entropy = (
            torch.where(ignored, 0.0, g[:, None]) / ctx.temperature for g in grads
        )
        any_ignored = bool(ignored.any())
        grad = torch.empty_like(logits)
        for rows in _blocks(logits):
            # in place: reading and writing the logits costs more than the arithmetic
            block = grad[rows] if grad.dtype == torch.float32 else grad[rows].float()
            _shifted(logits[rows].float(), log_z[rows], ctx.temperature, out=block)
            block.clamp_(min=FINITE)
            scale = -by_logprob[rows] - by_entropy[rows] * (block + entropy[rows, None])
            block.exp_().mul_(scale)
            block.scatter_add_(1, index[rows], by_logprob[rows])
            if any_ignored:
                block.masked_fill_(ignored[rows], 0.0)
            if grad.dtype != torch.float32:
                grad[rows] = block
        return grad, None, None


def _shifted(x: Tensor, by: Tensor, temperature: float, *, out: Tensor | None = None) -> Tensor:
    """Return x / temperature - by, for (M, V) and (M,), in one pass; `out` may be x."""
    return torch.add(-by[:, None], x, alpha=1 / temperature, out=out)


def _blocks(logits: Tensor) -> list[slice]:
    elements = 2**19 if logits.device.type == "cpu" else 2**25
    size = max(1, elements // logits.shape[1])
    return [slice(start, start + size) for start in range(0, logits.shape[0], size)]

"""PPO's losses on response tokens (Schulman et al., 2017, https://arxiv.org/abs/1707.06347).

Shapes: B sequences, T response tokens, padded on the right. Padding may hold any value, even nan.
With `num_tokens` counted over the global batch, the shards' results add up to that of the whole
batch, however it is split over micro-batches and ranks.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class PolicyLoss(NamedTuple):
    loss: Tensor  # () to minimize
    clip_frac: Tensor  # () share of tokens whose loss is clipped
    approx_kl: Tensor  # () KL(old || new) in nats per token, k3 estimate


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float,
    num_tokens: Tensor | int,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
) -> PolicyLoss:
    """Return the clipped surrogate loss (equation 7), summed and divided by `num_tokens`.

    The log-ratio is not clamped: a ratio that overflows makes the loss infinite, and the step is
    skipped.

    Args:
        logprobs: (B, T) under the policy being trained.
        old_logprobs: (B, T) under the policy before this iteration's updates.
        advantages: (B, T)
        mask: (B, T) bool, True on response tokens.
        clip_range: ratios are clipped to [1 - clip_range, 1 + clip_range].
        num_tokens: response tokens in the global batch.
        clip_range_high: replaces clip_range above 1 (DAPO, https://arxiv.org/abs/2503.14476).
        dual_clip: for negative advantages, the objective is at least dual_clip * advantage
            (https://arxiv.org/abs/1912.09729, equation 5).
        weights: (B, T) weight of each token in the loss, such as truncated importance weights.
    """
    # where, not multiply: 0 * nan is nan
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    advantages = torch.where(mask, advantages, 0.0)

    ratio = log_ratio.exp()
    high = clip_range if clip_range_high is None else clip_range_high
    surrogate = ratio * advantages
    clipped = ratio.clamp(1 - clip_range, 1 + high) * advantages
    objective = torch.minimum(surrogate, clipped)
    active = clipped < surrogate
    if dual_clip is not None:
        floor = torch.where(advantages < 0, dual_clip * advantages, -torch.inf)
        active = active | (floor > objective)
        objective = torch.maximum(objective, floor)
    if weights is not None:
        objective = objective * torch.where(mask, weights, 0.0)

    return PolicyLoss(
        loss=-objective.sum() / num_tokens,
        clip_frac=active.sum() / num_tokens,
        approx_kl=(ratio - 1 - log_ratio).detach().sum() / num_tokens,
    )


class ValueLoss(NamedTuple):
    loss: Tensor  # () to minimize
    clip_frac: Tensor  # () share of tokens whose loss is clipped


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip_range: float | None,
    num_tokens: Tensor | int,
) -> ValueLoss:
    """Return half the squared error, summed over tokens and divided by `num_tokens`.

    With `clip_range`, the error is the larger one of the value and of the value clipped to
    `clip_range` around its old estimate.
    """
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    error = (values - returns).square()
    if clip_range is None:
        return ValueLoss(0.5 * error.sum() / num_tokens, torch.zeros_like(error.sum()))
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    clipped_error = (clipped - returns).square()

    return ValueLoss(
        loss=0.5 * torch.maximum(error, clipped_error).sum() / num_tokens,
        clip_frac=(clipped_error > error).sum() / num_tokens,
    )

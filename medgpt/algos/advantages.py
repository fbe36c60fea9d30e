"""Compute token rewards, advantages and returns from a score per response.

Shapes: B sequences, T response tokens, padded on the right. Padding may hold any value, even nan.
"""

from typing import NamedTuple

import torch
from torch import Tensor

WHITEN_EPS = 1e-8


def token_rewards(
    scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float, score_clip: float | None = None
) -> Tensor:
    """Return (B, T) -kl_coef * kl plus the score on the last token of each row.

    The score counts once even if the mask has holes; a row without tokens is 0.

    Stiennon et al., 2020, section 3.4, https://arxiv.org/abs/2009.01325.

    Args:
        scores: (B,) one per response.
        kl: (B, T) in nats.
        mask: (B, T) bool, True on response tokens.
        score_clip: scores are clamped to [-score_clip, score_clip].
    """
    if score_clip is not None:
        scores = scores.clamp(-score_clip, score_clip)
    num_left = mask.flip(1).cumsum(1).flip(1)  # tokens from here on
    last = mask & (num_left == 1)
    penalty = torch.where(mask, -kl_coef * kl, 0.0)
    return penalty + torch.where(last, scores[:, None], 0.0)


class Advantages(NamedTuple):
    advantages: Tensor  # (B, T)
    returns: Tensor  # (B, T) targets of the values


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    bootstrap_values: Tensor | None = None,
) -> Advantages:
    """Return generalized advantage estimates, and returns (advantage plus value).

    Schulman et al., 2015, https://arxiv.org/abs/1506.02438, equation 16.

    Args:
        rewards: (B, T)
        values: (B, T) estimated before each token.
        mask: (B, T) bool, True on the first tokens of each row.
        bootstrap_values: (B,) value after the last token; 0 by default, the end of an episode.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantage = rewards.new_zeros(len(rewards))
    following = torch.zeros_like(advantage) if bootstrap_values is None else bootstrap_values
    columns = []
    for t in reversed(range(rewards.shape[1])):
        is_response = mask[:, t]
        delta = rewards[:, t] + gamma * following - values[:, t]
        # padding comes after the last token: `following` keeps its start value until there
        advantage = torch.where(is_response, delta + gamma * gae_lambda * advantage, 0.0)
        following = torch.where(is_response, values[:, t], following)
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1) if columns else torch.zeros_like(rewards)
    return Advantages(advantages, advantages + values)


def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    stats: tuple[Tensor | float, Tensor | float] | None = None,
    shift_mean: bool = True,
) -> Tensor:
    """Return x (B, T) scaled to variance 1 and, with `shift_mean`, shifted to mean 0.

    Args:
        stats: mean and variance of the global batch; by default those of x under the mask, with
            the unbiased variance, which is 0 for a single token.
    """
    x = torch.where(mask, x, 0.0)  # else the variance's gradient would be nan if padding is nan
    mean, variance = masked_stats(x, mask) if stats is None else map(torch.as_tensor, stats)
    white = (x - mean) * (variance + WHITEN_EPS).rsqrt()
    return torch.where(mask, white if shift_mean else white + mean, 0.0)


def masked_stats(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return () mean and () unbiased variance of x where mask is True; 0 if undefined."""
    count = mask.sum()
    mean = torch.where(mask, x, 0.0).sum() / count.clamp(min=1)
    squares = torch.where(mask, x - mean, 0.0).square().sum()
    return mean, squares / (count - 1).clamp(min=1)

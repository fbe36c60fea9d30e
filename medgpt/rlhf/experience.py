"""Experience: advantages and returns of every token of a rollout batch. Each rank of actor and
critic computes it for the whole batch, so all statistics are global.

Shapes: B sequences, T tokens of the longest response, N response tokens in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medgpt.algos.advantages import gae, masked_stats, token_rewards, whiten
from medgpt.algos.kl import kl_estimate
from medgpt.config.ppo import PPOConfig
from medgpt.rlhf.rollout_batch import (
    Logprobs,
    Ragged,
    Scores,
    Sequences,
    Values,
    join_per_sequence,
    join_per_token,
    join_sequences,
)


class RunningStats(NamedTuple):
    """Mean and variance of all scores so far (Chan et al., 1979)."""

    num: float = 0.0
    mean: float = 0.0
    sum_squares: float = 0.0  # sum of squared deviations from the mean

    def updated(self, x: NDArray[np.floating[Any]]) -> "RunningStats":
        if not len(x):
            return self
        num, mean = self.num + len(x), float(x.mean(dtype=np.float64))
        squares = float(np.square(x - mean, dtype=np.float64).sum())
        between = (mean - self.mean) ** 2 * self.num * len(x) / num
        return RunningStats(
            num, self.mean + (mean - self.mean) * len(x) / num, self.sum_squares + squares + between
        )

    @property
    def std(self) -> float:
        return (self.sum_squares / max(1.0, self.num - 1)) ** 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """A rollout batch with everything PPO needs to learn from it."""

    sequences: Sequences
    valid_rows: NDArray[np.int64]
    """Sequences to learn from. Left out are those with a failed reward, an empty response, or a
    log-probability or value that is not finite: whitening would spread it to all others."""
    old_logprobs: Tensor  # (N,)
    values: Tensor  # (N,) before the update
    advantages: Tensor  # (N,)
    returns: Tensor  # (N,)
    importance_weights: Tensor | None  # (N,) truncated importance weights
    score_stats: RunningStats  # including this batch
    metrics: dict[str, float]


def make_experience(
    rollouts: Sequence[Sequences],
    scores: Sequence[Scores],
    values: Sequence[Values],
    logprobs: Sequence[Logprobs],
    reference: Sequence[Logprobs],
    *,
    config: PPOConfig,
    kl_coef: float,
    score_stats: RunningStats,
) -> Experience:
    """Turn scores and KL into token rewards, advantages (GAE) and returns. The inputs are the
    outputs of all workers before the update, in any order."""
    sequences = join_sequences(rollouts)
    responses = sequences.responses
    flat = [join_per_token(outputs, responses) for outputs in (logprobs, reference, values)]
    totals = join_per_sequence([(part.index, part.totals) for part in scores])
    bootstrap = join_per_sequence([(part.index, part.bootstrap) for part in values])
    nonfinite = _has_nonfinite_token(responses, *flat) | ~np.isfinite(bootstrap)
    valid = np.isfinite(totals) & (responses.lengths > 0) & ~nonfinite
    valid_rows = np.flatnonzero(valid)

    shaped, stats = shape_scores(totals, sequences, valid, config, score_stats)
    response_mask = _response_mask(responses.lengths)  # (B, T)
    mask = response_mask & torch.from_numpy(valid)[:, None]
    padded_old, padded_reference, padded_values = (_pad(x, response_mask) for x in flat)
    kl = kl_estimate(padded_old, padded_reference, config.kl_estimator)
    rewards = token_rewards(shaped, kl, mask, kl_coef=kl_coef, score_clip=config.score_clip)
    last_values = torch.from_numpy(bootstrap) * torch.from_numpy(~sequences.finished)
    advantages, returns = gae(
        rewards,
        padded_values,
        mask,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        bootstrap_values=last_values if config.bootstrap_truncated else None,
    )
    if config.whiten_advantages:
        advantages = whiten(advantages, mask)
    gap_metrics, weights = importance_weights(flat[0], sequences, config)
    divergence = torch.where(mask, padded_old - padded_reference, 0.0).sum(1)[valid_rows]
    metrics = {
        "actor/kl_ref": float(divergence.mean()) if len(divergence) else 0.0,
        "actor/entropy": sum(part.entropy for part in logprobs) / max(1, len(responses.values)),
        "critic/explained_variance": _explained_variance(returns, padded_values, mask),
        "ppo/return_mean": float(masked_stats(returns, mask)[0]),
        "ppo/kl_coef": kl_coef,
        "ppo/not_finite": float(nonfinite.mean()),
    }
    return Experience(
        sequences=sequences,
        valid_rows=valid_rows,
        old_logprobs=torch.from_numpy(flat[0]),
        values=torch.from_numpy(flat[2]),
        advantages=advantages[response_mask],
        returns=returns[response_mask],
        importance_weights=weights,
        score_stats=stats,
        metrics=metrics | _batch_metrics(sequences, totals) | gap_metrics,
    )


def shape_scores(
    totals: NDArray[np.float32],
    sequences: Sequences,
    valid: NDArray[np.bool_],
    config: PPOConfig,
    stats: RunningStats,
) -> tuple[Tensor, RunningStats]:
    """Return (B,) scores after penalties and optional normalization, and the updated statistics."""
    scores = totals - np.float32(config.length_penalty) * sequences.responses.lengths
    scores = scores - np.float32(config.missing_end_penalty) * ~sequences.finished
    stats = stats.updated(scores[valid])
    if config.normalize_scores:
        scores = (scores - stats.mean) / (stats.std + 1e-8)
    return torch.from_numpy(scores.astype(np.float32)), stats


def importance_weights(
    old: NDArray[np.float32], sequences: Sequences, config: PPOConfig
) -> tuple[dict[str, float], Tensor | None]:
    """Return metrics of the gap between rollout engine and policy, and (N,) truncated importance
    weights min(ratio, cap) if the gap is too large."""
    distance = np.abs(old - sequences.logprobs)
    distance = distance[np.isfinite(distance)]
    if not len(distance):
        return {"rollout/logprob_gap": 0.0, "rollout/logprob_gap_max": 0.0}, None
    metrics = {
        "rollout/logprob_gap": float(distance.mean()),
        "rollout/logprob_gap_max": float(distance.max()),
    }
    if distance.mean() <= config.max_logprob_gap and not config.async_rollouts:
        return metrics, None
    ratio = torch.from_numpy(old - sequences.logprobs).exp()
    weights = ratio.clamp(max=config.max_importance_weight)
    return metrics | {"rollout/importance_weight": float(weights.nanmean())}, weights


def _batch_metrics(sequences: Sequences, totals: NDArray[np.float32]) -> dict[str, float]:
    """Return metrics of scores and lengths; `totals` (B,) are nan where the reward failed."""
    known, responses = totals[np.isfinite(totals)], sequences.responses
    return {
        "ppo/score_mean": float(known.mean()) if len(known) else 0.0,
        "ppo/score_std": float(known.std()) if len(known) else 0.0,
        "ppo/masked": float(len(totals) - len(known)),
        "rollout/response_tokens": float(responses.lengths.mean()),
        "rollout/prompt_tokens": float(sequences.prompts.lengths.mean()),
        "rollout/eos_rate": float(sequences.finished.mean()),
        "rollout/empty": float((responses.lengths == 0).sum()),
    }


def _response_mask(lengths: NDArray[np.int64]) -> Tensor:
    """(B, T) bool, True at response tokens."""
    width = max(1, int(lengths.max(initial=0)))
    return torch.arange(width) < torch.from_numpy(lengths)[:, None]


def _has_nonfinite_token(responses: Ragged, *flat: NDArray[np.float32]) -> NDArray[np.bool_]:
    """(B,) whether any of the `flat` (N,) numbers of a sequence is nan or infinite."""
    bad = ~np.isfinite(np.stack(flat)).all(0)
    rows = np.repeat(np.arange(len(responses)), responses.lengths)
    return np.bincount(rows[bad], minlength=len(responses)) > 0


def _pad(flat: NDArray[np.float32], response_mask: Tensor) -> Tensor:
    """Scatter (N,) numbers into (B, T), zero-padded."""
    rows = torch.zeros(response_mask.shape)
    rows[response_mask] = torch.from_numpy(flat)
    return rows


def _explained_variance(returns: Tensor, values: Tensor, mask: Tensor) -> float:
    """Return 1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for a constant."""
    variance = float(masked_stats(returns, mask)[1])
    residual = float(masked_stats(returns - values, mask)[1])
    return 1 - residual / variance if variance > 0 else 0.0

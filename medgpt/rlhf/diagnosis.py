"""Divergence checks on the logged metrics; each message says what to try.

Pure functions of the history: one dict of metrics per iteration, oldest first. Metrics that an
iteration did not log are ignored.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev

from medgpt.config.ppo_rewards import DiagnosisConfig

Metrics = Mapping[str, float]
History = Sequence[Metrics]
KL = "actor/kl_ref"  # nats per answer, mean
ENTROPY = "actor/entropy"  # nats per token, mean
SCORE = "ppo/score_mean"
LENGTH = "rollout/response_tokens"  # mean
LOGPROB_GAP = "rollout/logprob_gap"  # nats per token, mean
STEP_COUNTS = (  # steps of the iteration, skipped ones, learning rate to lower
    ("ppo/steps", "ppo/skipped_steps", "optimizer.learning_rate"),
    ("critic/steps", "critic/skipped_steps", "critic.optimizer.learning_rate"),
)
NOT_FINITE = "ppo/not_finite"  # share of samples left out for nan or inf
MASKED = "rewards/masked"  # share of samples without a reward
JUDGE_METRICS = ("judge/score", "judge/checks")  # the standard error is NAME_se
MUST_BE_FINITE = (KL, ENTROPY, SCORE, LENGTH)


class Diverged(RuntimeError):
    """A diagnosis halted the run; the message says why and what to try."""


def diagnose(history: History, config: DiagnosisConfig) -> str | None:
    """Return the reason to halt the run after its latest iteration, or None."""
    return next((why for check in CHECKS if (why := check(history, config))), None)


def nonfinite_numbers(history: History, config: DiagnosisConfig) -> str | None:
    """A metric is nan or infinite, or too many steps or samples were skipped."""
    latest = history[-1] if history else {}
    for name in MUST_BE_FINITE:
        if name in latest and not math.isfinite(latest[name]):
            return f"{name} is {latest[name]}; lower optimizer.learning_rate or compute in fp32"
    recent_lines = history[-config.window :]
    for steps_metric, skipped_metric, key in STEP_COUNTS:
        steps = sum(line.get(steps_metric, 0) for line in recent_lines)
        skipped = sum(line.get(skipped_metric, 0) for line in recent_lines)
        if config.max_skipped_share and steps and skipped / steps > config.max_skipped_share:
            owner = "the critic's " if key.startswith("critic") else ""
            return (
                f"{skipped:.0f} of {owner}{steps:.0f} optimizer steps in {len(recent_lines)} "
                f"iterations were not finite and were skipped; lower {key} or compute in fp32"
            )
    left_out = _recent_mean(history, NOT_FINITE, config.window)
    if config.max_skipped_share and left_out and left_out > config.max_skipped_share:
        return (
            f"{left_out:.0%} of the samples were left out: a model returned numbers that are not "
            "finite; lower optimizer.learning_rate or compute in fp32"
        )
    return None


def too_many_masked(history: History, config: DiagnosisConfig) -> str | None:
    """Too many samples have no reward."""
    share = _recent_mean(history, MASKED, config.window)
    if share is None or not config.max_masked_share or share <= config.max_masked_share:
        return None
    names = [
        name.removeprefix("rewards/").removesuffix("_masked")
        for name, value in history[-1].items()
        if name.startswith("rewards/") and name.endswith("_masked") and value
    ]
    components = ", ".join(names) or "a component"
    return (
        f"{share:.0%} of the samples have no reward because {components} failed; the log names "
        "the errors"
    )


def engines_disagree(history: History, config: DiagnosisConfig) -> str | None:
    """The rollout engine and the training forward compute different models."""
    gap = history[-1].get(LOGPROB_GAP, 0.0) if history else 0.0
    if not config.max_logprob_gap or gap <= config.max_logprob_gap:
        return None
    return (
        f"{LOGPROB_GAP} is {gap:.3g} nats a token, more than diagnosis.max_logprob_gap="
        f"{config.max_logprob_gap:g}: the rollout engine and the training forward compute "
        "different models; compute both in fp32, set rollout.engine=hf, or choose another model"
    )


def far_from_reference(history: History, config: DiagnosisConfig) -> str | None:
    """The policy is too far from the reference."""
    kl = _recent_mean(history, KL, config.window)
    if kl is None or not config.max_kl or kl <= config.max_kl:
        return None
    return (
        f"the policy is {kl:.3g} nats an answer from the reference, more than diagnosis.max_kl="
        f"{config.max_kl:g}; raise ppo.kl_coef or lower optimizer.learning_rate"
    )


def entropy_collapse(history: History, config: DiagnosisConfig) -> str | None:
    """The policy gives nearly the same answer to every prompt."""
    means = _first_and_recent_means(history, ENTROPY, config.window)
    if means is None or not config.min_entropy_share:
        return None
    first, recent = means
    if recent >= config.min_entropy_share * first:
        return None
    return (
        f"entropy fell from {first:.3g} to {recent:.3g} nats a token, below "
        f"{config.min_entropy_share:g} of its initial value; raise ppo.kl_coef or "
        "ppo.entropy_coef, or lower optimizer.learning_rate"
    )


def length_explosion(history: History, config: DiagnosisConfig) -> str | None:
    """Answers become much longer."""
    means = _first_and_recent_means(history, LENGTH, config.window)
    if means is None or not config.max_length_factor:
        return None
    first, recent = means
    if recent <= config.max_length_factor * first:
        return None
    return (
        f"answers grew from {first:.0f} to {recent:.0f} tokens, more than "
        f"{config.max_length_factor:g} times; the reward may pay for length: look at its "
        "components, or set ppo.length_penalty"
    )


def reward_hacking(history: History, config: DiagnosisConfig) -> str | None:
    """The training score rises while a held-out judge metric falls."""
    if not config.judge_drop:
        return None
    reasons = (_exploits_reward(history, metric, config) for metric in JUDGE_METRICS)
    return next((reason for reason in reasons if reason), None)


def _exploits_reward(history: History, metric: str, config: DiagnosisConfig) -> str | None:
    judged = [i for i, line in enumerate(history) if metric in line]
    if len(judged) <= config.judge_patience:
        return None
    best_step = max(judged[: -config.judge_patience], key=lambda i: history[i][metric])
    best, recent = history[best_step], [history[i] for i in judged[-config.judge_patience :]]
    if not all(_is_below(line, best, metric, config.judge_drop) for line in recent):
        return None
    scores = _values(history, SCORE)
    scores_before = _values(history[: best_step + 1], SCORE)[-config.window :]
    if len(scores_before) < config.window:  # best before the first full window of scores
        scores_before = scores[: config.window]
    scores_now = scores[-config.window :]
    is_full = len(scores_now) == config.window
    if not is_full or not _has_risen(scores_before, scores_now, config.judge_drop):
        return None
    return (
        f"the training score rose from {fmean(scores_before):.3g} to {fmean(scores_now):.3g} "
        f"while the held-out {metric} fell from {best[metric]:.3g} to {recent[-1][metric]:.3g}: "
        "the policy exploits the reward; raise ppo.kl_coef, cap or drop the component that rose, "
        "or stop earlier"
    )


def _is_below(line: Metrics, best: Metrics, metric: str, errors: float) -> bool:
    """Return whether the metric is `errors` standard errors of the difference below the best."""
    error = math.hypot(line.get(f"{metric}_se", 0.0), best.get(f"{metric}_se", 0.0))
    return line[metric] < best[metric] - errors * error


def _has_risen(before: Sequence[float], now: Sequence[float], errors: float) -> bool:
    """Return whether the mean rose by `errors` standard errors of the difference."""
    error = math.hypot(*(stdev(part) / math.sqrt(len(part)) for part in (before, now)))
    return fmean(now) - fmean(before) > errors * error


def _values(history: History, name: str) -> list[float]:
    return [line[name] for line in history if name in line]


def _recent_mean(history: History, name: str, window: int) -> float | None:
    """Return the mean of the last window; None before it is full."""
    values = _values(history, name)[-window:]
    return fmean(values) if len(values) == window else None


def _first_and_recent_means(history: History, name: str, window: int) -> tuple[float, float] | None:
    """Return the means of the first and the last window; None while they overlap."""
    values = _values(history, name)
    if len(values) < 2 * window:
        return None
    return fmean(values[:window]), fmean(values[-window:])


CHECKS: tuple[Callable[[History, DiagnosisConfig], str | None], ...] = (
    nonfinite_numbers,
    too_many_masked,
    engines_disagree,
    far_from_reference,
    entropy_collapse,
    length_explosion,
    reward_hacking,
)

"""The learning-rate schedule, a pure function of the step."""

import math

from medgpt.config.train import OptimizerConfig


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of optimizer step `step` (the first is 0) of `total_steps`.

    Warm-up is linear and would be 0 at step -1, so the first step already trains. The decay reaches
    `min_lr_ratio` times the peak at step `total_steps`, one past the last, and stays there.
    """
    peak, floor = config.learning_rate, config.min_lr_ratio
    warmup = round(config.warmup_share * total_steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return peak
    start = warmup
    if config.schedule == "wsd":  # stays at the peak until the final decay
        start = max(warmup, total_steps - round(config.decay_share * total_steps))
    progress = min(1.0, max(0, step - start) / max(1, total_steps - start))
    remaining = 1 - progress  # linear and wsd
    if config.schedule == "cosine":
        remaining = (1 + math.cos(math.pi * progress)) / 2
    return peak * (floor + (1 - floor) * remaining)

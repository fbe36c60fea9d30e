"""The reward of an answer: a weighted sum of named components, capped where a rule is violated.

If a component has no value, the sample has no reward: it is masked and counted, never 0. Empty
answers violate no rule, so they are capped as well.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean

from medgpt.config.ppo_rewards import SCORE_COMPONENT, PPORewardConfig, RuleName
from medgpt.medical.rules import RULES
from medgpt.rlhf.rewards.functions import RewardFunction, finite_or_none
from medgpt.rlhf.rewards.reward_sample import RewardSample

log = logging.getLogger(__name__)
Values = list[float | None]


@dataclass(frozen=True, slots=True)
class RewardResult:
    """Rewards of n samples; None where a sample has no value."""

    totals: Values  # (n,)
    components: dict[str, Values]  # by name, unweighted; (n,) each
    violations: dict[RuleName, list[bool | None]]  # (n,) each; None where the rule failed
    empty: list[bool]  # (n,) the answer is empty
    capped: list[bool]  # (n,) a violation or an empty answer lowered the sum to the cap


class WeightedRewards:
    """All reward components of a run."""

    def __init__(self, config: PPORewardConfig) -> None:
        """Raises ConfigError if a user-defined function cannot be used."""
        self._cap = config.violation_cap
        self._rules = tuple(config.rule_weights())
        self._functions = [RewardFunction(function) for function in config.functions]
        self.needs_scores = config.score_weight > 0
        self._weights: dict[str, float] = {**config.rule_weights()}
        self._weights |= {function.name: function.weight for function in config.functions}
        if self.needs_scores:
            self._weights[SCORE_COMPONENT] = config.score_weight

    def __call__(
        self, samples: Sequence[RewardSample], scores: Sequence[float] | None = None
    ) -> RewardResult:
        """Reward n samples. `scores`: (n,) of the reward model; required unless its weight is 0."""
        components: dict[str, Values] = {}
        if self.needs_scores:
            assert scores is not None, "the reward model's scores are missing"
            assert len(scores) == len(samples), f"{len(scores)} scores, {len(samples)} answers"
            components[SCORE_COMPONENT] = [finite_or_none(score) for score in scores]
        violations: dict[RuleName, list[bool | None]] = {
            name: [_violates(name, sample) for sample in samples] for name in self._rules
        }
        for name in self._rules:
            components[name] = [None if x is None else -1.0 if x else 0.0 for x in violations[name]]
        components |= {function.name: function(samples) for function in self._functions}
        empty = [not sample.text.strip() for sample in samples]
        sums = [self._sum(components, row) for row in range(len(samples))]
        capped = [
            total is not None
            and total > self._cap
            and (empty[row] or any(violations[name][row] for name in self._rules))
            for row, total in enumerate(sums)
        ]
        totals = [self._cap if cut else total for cut, total in zip(capped, sums, strict=True)]
        return RewardResult(totals, components, violations, empty, capped)

    def _sum(self, components: dict[str, Values], row: int) -> float | None:
        total = 0.0
        for name, weight in self._weights.items():
            value = components[name][row]
            if value is None:
                return None
            total += weight * value
        return total


def reward_metrics(results: Sequence[RewardResult]) -> dict[str, float]:
    """Return means and shares of masked, capped and violating samples over all workers."""
    totals = [total for result in results for total in result.totals]
    if not totals:
        return {}
    metrics = _mean_and_masked_share("rewards/total", totals)
    metrics["rewards/masked"] = metrics.pop("rewards/total_masked")
    metrics["rewards/capped"] = fmean(chain.from_iterable(result.capped for result in results))
    metrics["rewards/empty"] = fmean(chain.from_iterable(result.empty for result in results))
    for name in results[0].components:
        values = [value for result in results for value in result.components[name]]
        metrics |= _mean_and_masked_share(f"rewards/{name}", values)
    for name in results[0].violations:
        violated = chain.from_iterable(result.violations[name] for result in results)
        known = [is_violated for is_violated in violated if is_violated is not None]
        if known:
            metrics[f"rewards/{name}_violations"] = fmean(known)
    return metrics


def _violates(name: RuleName, sample: RewardSample) -> bool | None:
    """Return whether the rule is violated, None if it fails. Logs name the error's type only."""
    try:
        return RULES[name](sample.said, sample.text)
    except Exception as error:  # a failing rule masks this sample only
        log.warning("rule %s raised %s on %s", name, type(error).__name__, sample.sample_id)
        return None


def _mean_and_masked_share(name: str, values: Values) -> dict[str, float]:
    """Return mean and masked share; no mean if no sample has a value, as 0 would look fine."""
    known = [value for value in values if value is not None]
    mean = {name: fmean(known)} if known else {}
    return mean | {f"{name}_masked": 1 - len(known) / len(values)}

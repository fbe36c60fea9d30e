"""95 % confidence intervals of scores, and paired comparisons of two models.

A score is a ratio of sums over items, given as (numerator, denominator) per item; for a mean the
denominator is 1. Items are resampled, never tokens: the tokens of one answer are not independent.
A proportion of items has Wilson's interval, since resampling a few items that are all right would
give an interval of width 0.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap

NUM_RESAMPLES = 2000
MAX_INDICES_PER_BATCH = 1 << 22  # bounds the memory

RatioTerms = NDArray[np.float64]  # (n, 2) numerators and denominators
Verdict = Literal["higher", "lower", "same", "undecided"]


class Interval(NamedTuple):
    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """Our score against theirs on the items that both runs have.

    The verdict is `same` if the interval of the difference lies within +-margin, else `higher` or
    `lower` if the interval excludes 0, else `undecided`.
    """

    n: int
    ours: float
    theirs: float
    difference: Interval
    p_value: float | None  # of McNemar's exact test; None unless every value is 0 or 1
    margin: float

    @property
    def verdict(self) -> Verdict:
        low, high = self.difference.low, self.difference.high
        if -self.margin <= low and high <= self.margin:
            return "same"
        if low > 0:
            return "higher"
        return "lower" if high < 0 else "undecided"


def confidence_interval(values: RatioTerms, seed: int, *, is_proportion: bool = True) -> Interval:
    """Return the ratio of sums with its 95 % interval.

    The interval is Wilson's (1927) if every item counts 0 or 1, else the percentile bootstrap's.
    Items with denominator 0 do not count.

    Args:
        is_proportion: the score can only lie between 0 and 1. If it is 0 or 1 in every item, the
            interval is Wilson's as well.

    Raises:
        ValueError: no items, a value that is not finite, or denominators that sum to 0.
    """
    _check(values)
    values = values[values[:, 1] > 0]
    value = float(_ratio(values))
    if is_proportion and (_is_binary(values) or value in (0, 1)):
        return wilson_interval(round(float((values[:, 0] / values[:, 1]).sum())), len(values))
    return bootstrap_interval(lambda rows: _ratio(values[rows]), len(values), seed)


def wilson_interval(hits: int, n: int) -> Interval:
    """Return hits / n with Wilson's 95 % interval."""
    proportion = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    return Interval(hits / n, float(proportion.low), float(proportion.high))


def paired_difference(ours: RatioTerms, theirs: RatioTerms, seed: int) -> Interval:
    """Return our score minus theirs with its 95 % interval, from a paired bootstrap.

    Row i of both is the same item, so both are resampled with the same indices.

    Raises:
        ValueError: as `confidence_interval`, or the shapes differ.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"paired values have shapes {ours.shape} and {theirs.shape}")
    _check(ours)
    _check(theirs)
    return bootstrap_interval(
        lambda rows: _ratio(ours[rows]) - _ratio(theirs[rows]), len(ours), seed
    )


def mcnemar_p_value(ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> float:
    """Return the two-sided p-value of McNemar's exact test; both arrays are (n,)."""
    num_ours_only = int((ours & ~theirs).sum())
    num_changed = int((ours != theirs).sum())
    return float(binomtest(num_ours_only, num_changed).pvalue) if num_changed else 1.0


def compare_runs(
    ours: Mapping[str, tuple[float, float]],
    theirs: Mapping[str, tuple[float, float]],
    *,
    margin: float,
    seed: int,
) -> Comparison:
    """Compare two runs in one metric, given as ratio terms by item id.

    Raises:
        ValueError: the runs share no item, or the margin is negative.
    """
    if margin < 0:
        raise ValueError(f"margin={margin} is negative")
    shared = sorted(ours.keys() & theirs.keys())
    our_terms, their_terms = (
        np.array([run[id] for id in shared], np.float64).reshape(-1, 2) for run in (ours, theirs)
    )
    difference = paired_difference(our_terms, their_terms, seed)
    p_value = None
    if _is_binary(our_terms) and _is_binary(their_terms):
        p_value = mcnemar_p_value(our_terms[:, 0] == 1, their_terms[:, 0] == 1)
    scores = float(_ratio(our_terms)), float(_ratio(their_terms))
    return Comparison(len(shared), *scores, difference, p_value, margin)


def bootstrap_interval(
    score: Callable[[NDArray[np.int64]], NDArray[np.float64]], n: int, seed: int
) -> Interval:
    """Return a score of n items with its 95 % percentile bootstrap interval.

    Args:
        score: called with (R, n) item indices, returns (R,) scores.
    """
    (value,) = score(np.arange(n)[None])
    if n == 1:  # every resample is the item itself
        return Interval(float(value), float(value), float(value))
    low, high = bootstrap(
        (np.arange(n),),
        lambda rows, axis: score(rows),
        n_resamples=NUM_RESAMPLES,
        batch=max(1, MAX_INDICES_PER_BATCH // n),
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(value), float(low), float(high))


def _check(values: RatioTerms) -> None:
    if values.ndim != 2 or values.shape[1] != 2 or not len(values):
        raise ValueError(f"a score needs (n, 2) values with n > 0, not {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("the values of a score must be finite")
    if values[:, 1].sum() <= 0:
        raise ValueError("the denominators of a score sum to 0")


def _is_binary(values: RatioTerms) -> bool:
    """Return whether every item is right or wrong: 0 or 1, over 1."""
    return bool(np.isin(values[:, 0], (0, 1)).all() and (values[:, 1] == 1).all())


def _ratio(values: RatioTerms) -> NDArray[np.float64]:
    """Return (...) ratios of sums of (..., n, 2) terms."""
    sums = values.sum(-2)
    return sums[..., 0] / sums[..., 1]

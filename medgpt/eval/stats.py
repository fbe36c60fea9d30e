"""95 % confidence intervals of scores, and paired comparisons of two models.

A score is a ratio of sums over items, given as (numerator, denominator) per item; for a mean the
denominator is 1. Items are resampled, never tokens: the tokens of one answer are not independent.
A proportion of items has Wilson's interval, since resampling a few items that are all right would
give an interval of width 0.
"""

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

NUM_RESAMPLES = 2000
MAX_INDICES_PER_BATCH = 1 << 22  # bounds the memory
PERCENTILES = (2.5, 97.5)  # percentiles: 95 %

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

    Args:
        is_proportion: the score can only lie between 0 and 1. If it is 0 or 1 in every item, the
            interval is Wilson's as well.

    Raises:
        ValueError: no items, a value that is not finite, or denominators that sum to 0.
    """
    _check(values)
    value, counted_items = _ratio(values), values[values[:, 1] > 0]
    item_scores = counted_items[:, 0] / counted_items[:, 1]
    is_binary = np.isin(item_scores, (0, 1)).all() and (values[:, 1] == 1).all()
    if is_proportion and (is_binary or value in (0, 1)):
        return wilson_interval(round(float(item_scores.sum())), len(item_scores))
    sums = np.concatenate([values[rows].sum(1) for rows in _index_batches(len(values), seed)])
    return Interval(value, *_percentiles(_ratios(sums)))


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
    resampled = [
        _ratios(ours[rows].sum(1)) - _ratios(theirs[rows].sum(1))
        for rows in _index_batches(len(ours), seed)
    ]
    return Interval(_ratio(ours) - _ratio(theirs), *_percentiles(np.concatenate(resampled)))


def mcnemar_p_value(ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> float:
    """Return the two-sided p-value of McNemar's exact test; both arrays are (n,)."""
    num_ours_only = int((ours & ~theirs).sum())
    num_theirs_only = int((theirs & ~ours).sum())
    return (
        float(binomtest(num_ours_only, num_ours_only + num_theirs_only).pvalue)
        if num_ours_only + num_theirs_only
        else 1.0
    )


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
    is_binary = bool(
        np.isin(np.stack([our_terms[:, 0], their_terms[:, 0]]), (0, 1)).all()
    ) and bool((np.stack([our_terms[:, 1], their_terms[:, 1]]) == 1).all())
    p_value = mcnemar_p_value(our_terms[:, 0] == 1, their_terms[:, 0] == 1) if is_binary else None
    return Comparison(
        len(shared), _ratio(our_terms), _ratio(their_terms), difference, p_value, margin
    )


def bootstrap_indices(n: int, seed: int) -> NDArray[np.int64]:
    """Return (NUM_RESAMPLES, n) item indices, drawn with replacement."""
    return np.concatenate(list(_index_batches(n, seed)))


def _index_batches(n: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield the same indices in batches of rows."""
    rng = np.random.default_rng(seed)
    batch_size = max(1, MAX_INDICES_PER_BATCH // n)
    for start in range(0, NUM_RESAMPLES, batch_size):
        yield rng.integers(n, size=(min(batch_size, NUM_RESAMPLES - start), n))


def _check(values: RatioTerms) -> None:
    if values.ndim != 2 or values.shape[1] != 2 or not len(values):
        raise ValueError(f"a score needs (n, 2) values with n > 0, not {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("the values of a score must be finite")
    if values[:, 1].sum() <= 0:
        raise ValueError("the denominators of a score sum to 0")


def _ratio(values: RatioTerms) -> float:
    numerator, denominator = values.sum(0)
    return float(numerator / denominator)


def _ratios(sums: RatioTerms) -> RatioTerms:
    """Return (R,) ratios of (R, 2) sums; nan where a resample has no denominator."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[:, 1] > 0, sums[:, 0] / sums[:, 1], np.nan)


def _percentiles(resampled: RatioTerms) -> tuple[float, float]:
    low, high = np.nanpercentile(resampled, PERCENTILES)
    return float(low), float(high)

"""How sure a score is: 95 % intervals, and two models on the same questions.

A score is a ratio of sums over items: (numerator, denominator) of each; for a mean the second is 1.
Items are resampled, never tokens, since those of one answer depend on each other. A share of items
has Wilson's interval: all of a few items right is no certainty, which resampling would call it.
"""

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

NUM_RESAMPLES = 2000
MAX_INDICES_PER_BATCH = 1 << 22  # items; bounds the memory
PERCENTILES = (2.5, 97.5)  # percentiles: 95 %

RatioTerms = NDArray[np.float64]  # (n, 2) numerators and denominators
Verdict = Literal["higher", "lower", "same", "undecided"]


class Interval(NamedTuple):
    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """Of ours with theirs on the items that both have.

    The verdict: `same` if the interval of the difference lies within +-margin, else `higher` or
    `lower` if it excludes 0, else `undecided`.
    """

    n: int
    ours: float
    theirs: float
    difference: Interval
    p_value: float | None  # McNemar's exact test; None unless every item is right or wrong
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
    """The ratio of sums with its 95 % interval: Wilson's (1927) where every item counts 0 or 1,
    else the percentile bootstrap's.

    Args:
        share: the score lies between 0 and 1 by its nature. Where it is 0 or 1 in every item, the
            interval is Wilson's, too.

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
    """The share of hits with Wilson's 95 % interval."""
    proportion = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    return Interval(hits / n, float(proportion.low), float(proportion.high))


def paired_difference(ours: RatioTerms, theirs: RatioTerms, seed: int) -> Interval:
    """Ours minus theirs, row i of both being the same item: both are resampled together.

    Raises:
        ValueError: as `interval`, or the two have different shapes.
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
    """Two-sided p-value of McNemar's exact test: only items that one of the two got right count."""
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
    """Two runs' values of one metric by item id.

    Raises:
        ValueError: no item in common, or a negative margin.
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
    """(RESAMPLES, n) item numbers, drawn with replacement."""
    return np.concatenate(list(_index_batches(n, seed)))


def _index_batches(n: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """The same in (some, n) pieces."""
    rng = np.random.default_rng(seed)
    batch_size = max(1, MAX_INDICES_PER_BATCH // n)
    for start in range(0, NUM_RESAMPLES, batch_size):
        yield rng.integers(n, size=(min(batch_size, NUM_RESAMPLES - start), n))


def _check(values: RatioTerms) -> None:
    if values.ndim != 2 or values.shape[1] != 2 or not len(values):
        raise ValueError(f"a score needs (n, 2) values with n > 0, not {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("a score's values must be finite")
    if values[:, 1].sum() <= 0:
        raise ValueError("a score's denominators sum to 0")


def _ratio(values: RatioTerms) -> float:
    numerator, denominator = values.sum(0)
    return float(numerator / denominator)


def _ratios(sums: RatioTerms) -> RatioTerms:
    """(R,) of (R, 2) sums; nan where a resample has no denominator."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[:, 1] > 0, sums[:, 0] / sums[:, 1], np.nan)


def _percentiles(resampled: RatioTerms) -> tuple[float, float]:
    low, high = np.nanpercentile(resampled, PERCENTILES)
    return float(low), float(high)

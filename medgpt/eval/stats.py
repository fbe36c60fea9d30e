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

RESAMPLES = 2000
DRAWN_AT_ONCE = 1 << 22  # items; bounds the memory
TAILS = (2.5, 97.5)  # percentiles: 95 %

Values = NDArray[np.float64]  # (n, 2) numerators and denominators
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


def interval(values: Values, seed: int, *, share: bool = True) -> Interval:
    """The ratio of sums with its 95 % interval: Wilson's (1927) where every item counts 0 or 1,
    else the percentile bootstrap's.

    Args:
        share: the score lies between 0 and 1 by its nature. Where it is 0 or 1 in every item, the
            interval is Wilson's, too.

    Raises:
        ValueError: no items, a value that is not finite, or denominators that sum to 0.
    """
    _check(values)
    value, counted = _ratio(values), values[values[:, 1] > 0]
    parts = counted[:, 0] / counted[:, 1]
    is_binary = np.isin(parts, (0, 1)).all() and (values[:, 1] == 1).all()
    if share and (is_binary or value in (0, 1)):
        return wilson(round(float(parts.sum())), len(parts))
    sums = np.concatenate([values[rows].sum(1) for rows in _resampled(len(values), seed)])
    return Interval(value, *_percentiles(_ratios(sums)))


def wilson(hits: int, n: int) -> Interval:
    """The share of hits with Wilson's 95 % interval."""
    found = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    return Interval(hits / n, float(found.low), float(found.high))


def difference(ours: Values, theirs: Values, seed: int) -> Interval:
    """Ours minus theirs, row i of both being the same item: both are resampled together.

    Raises:
        ValueError: as `interval`, or the two have different shapes.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"paired values have shapes {ours.shape} and {theirs.shape}")
    _check(ours)
    _check(theirs)
    drawn = [
        _ratios(ours[rows].sum(1)) - _ratios(theirs[rows].sum(1))
        for rows in _resampled(len(ours), seed)
    ]
    return Interval(_ratio(ours) - _ratio(theirs), *_percentiles(np.concatenate(drawn)))


def mcnemar(ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> float:
    """Two-sided p-value of McNemar's exact test: only items that one of the two got right count."""
    gained = int((ours & ~theirs).sum())
    lost = int((theirs & ~ours).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def compare(
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
    a, b = (
        np.array([run[id] for id in shared], np.float64).reshape(-1, 2) for run in (ours, theirs)
    )
    found = difference(a, b, seed)
    is_binary = bool(np.isin(np.stack([a[:, 0], b[:, 0]]), (0, 1)).all()) and bool(
        (np.stack([a[:, 1], b[:, 1]]) == 1).all()
    )
    p_value = mcnemar(a[:, 0] == 1, b[:, 0] == 1) if is_binary else None
    return Comparison(len(shared), _ratio(a), _ratio(b), found, p_value, margin)


def resamples(n: int, seed: int) -> NDArray[np.int64]:
    """(RESAMPLES, n) item numbers, drawn with replacement."""
    return np.concatenate(list(_resampled(n, seed)))


def _resampled(n: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """The same in (some, n) pieces."""
    random = np.random.default_rng(seed)
    step = max(1, DRAWN_AT_ONCE // n)
    for start in range(0, RESAMPLES, step):
        yield random.integers(n, size=(min(step, RESAMPLES - start), n))


def _check(values: Values) -> None:
    if values.ndim != 2 or values.shape[1] != 2 or not len(values):
        raise ValueError(f"a score needs (n, 2) values with n > 0, not {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("a score's values must be finite")
    if values[:, 1].sum() <= 0:
        raise ValueError("a score's denominators sum to 0")


def _ratio(values: Values) -> float:
    numerator, denominator = values.sum(0)
    return float(numerator / denominator)


def _ratios(sums: Values) -> Values:
    """(R,) of (R, 2) sums; nan where a resample has no denominator."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[:, 1] > 0, sums[:, 0] / sums[:, 1], np.nan)


def _percentiles(drawn: Values) -> tuple[float, float]:
    low, high = np.nanpercentile(drawn, TAILS)
    return float(low), float(high)

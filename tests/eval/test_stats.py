"""Intervals and tests against scipy and against values computed by hand."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from medgpt.eval import stats


def random_ratio_terms(n: int, seed: int) -> np.ndarray:
    """Return items like those of a negative log-likelihood: a sum and a number of tokens each."""
    random = np.random.default_rng(seed)
    lengths = random.integers(5, 60, n).astype(float)
    return np.stack([lengths * random.gamma(4.0, 0.5, n), lengths], axis=1)


def ratio(numerators: np.ndarray, denominators: np.ndarray, axis: int = -1) -> np.ndarray:
    return numerators.sum(axis) / denominators.sum(axis)


def test_the_interval_is_scipys_percentile_bootstrap():
    values = random_ratio_terms(200, seed=1)
    ours = stats.confidence_interval(values, seed=0)
    theirs = scipy_stats.bootstrap(
        (values[:, 0], values[:, 1]),
        ratio,
        paired=True,
        method="percentile",
        n_resamples=20_000,
        vectorized=True,
        rng=np.random.default_rng(7),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.value == pytest.approx(values[:, 0].sum() / values[:, 1].sum())
    assert ours.low == pytest.approx(theirs.low, abs=0.06 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.06 * width)


def test_the_interval_of_a_proportion_is_near_the_exact_one_and_covers_the_truth():
    random = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        right = (random.random(120) < 0.3).astype(float)
        found = stats.confidence_interval(np.stack([right, np.ones(120)], axis=1), seed=trial)
        covered += found.low <= 0.3 <= found.high
    assert 0.90 <= covered / 200 <= 0.985
    exact = scipy_stats.binomtest(36, 120).proportion_ci(0.95)
    right = np.repeat([1.0, 0.0], [36, 84])
    found = stats.confidence_interval(np.stack([right, np.ones(120)], axis=1), seed=0)
    assert found.low == pytest.approx(exact.low, abs=0.02)
    assert found.high == pytest.approx(exact.high, abs=0.02)


def test_a_proportion_has_wilsons_interval_even_if_all_items_agree():
    def share_of(right: int, n: int) -> stats.Interval:
        hits = np.repeat([1.0, 0.0], [right, n - right])
        return stats.confidence_interval(np.stack([hits, np.ones(n)], axis=1), seed=0)

    z = scipy_stats.norm.ppf(0.975)
    assert share_of(30, 30) == (1.0, pytest.approx(30 / (30 + z**2)), 1.0)
    assert share_of(0, 3) == (0.0, 0.0, pytest.approx(z**2 / (3 + z**2)))
    centre, half = (24 + z**2 / 2) / (30 + z**2), z * np.sqrt(24 * 6 / 30 + z**2 / 4) / (30 + z**2)
    assert share_of(24, 30)[1:] == pytest.approx((centre - half, centre + half))
    # the item is the unit: 4 of 4 key points in one question are one hit
    whole = stats.confidence_interval(np.array([[4.0, 4.0]] * 30), seed=0)
    assert whole == (1.0, pytest.approx(30 / (30 + z**2)), 1.0)
    one_word = stats.confidence_interval(np.ones((30, 2)), seed=0, is_proportion=False)  # a length
    assert one_word == (1.0, 1.0, 1.0)


def test_the_interval_depends_on_the_seed_and_not_on_the_batch_size(monkeypatch):
    values = random_ratio_terms(50, seed=2)
    whole = stats.confidence_interval(values, seed=5)
    assert whole == stats.confidence_interval(values, seed=5)
    assert whole != stats.confidence_interval(values, seed=6)
    monkeypatch.setattr(stats, "MAX_INDICES_PER_BATCH", 1000)
    assert stats.confidence_interval(values, seed=5) == whole


def test_resamples_without_a_denominator_are_left_out():
    found = stats.confidence_interval(np.array([[1.0, 2.0], [0.0, 0.0]]), seed=0)
    assert found == (0.5, 0.5, 0.5)


def test_invalid_ratio_terms_are_an_error():
    for values in (np.empty((0, 2)), np.ones(3), np.array([[1.0, np.nan]]), np.array([[1.0, 0.0]])):
        with pytest.raises(ValueError, match="score"):
            stats.confidence_interval(values, seed=0)


def test_a_paired_difference_has_a_narrower_interval_than_its_scores():
    theirs = random_ratio_terms(150, seed=4)
    ours = theirs + np.array([0.5, 0.0])
    found = stats.paired_difference(ours, theirs, seed=0)
    apart = stats.confidence_interval(ours, seed=0)
    assert found.value == pytest.approx(0.5 * 150 / theirs[:, 1].sum())
    assert found.high - found.low < 0.1 * (apart.high - apart.low)
    with pytest.raises(ValueError, match="shapes"):
        stats.paired_difference(ours, theirs[:10], seed=0)


def test_the_paired_difference_is_scipys_paired_bootstrap():
    ours, theirs = random_ratio_terms(150, seed=4), random_ratio_terms(150, seed=5)
    found = stats.paired_difference(ours, theirs, seed=0)

    def statistic(a, b, c, d, axis=-1):
        return ratio(a, b, axis) - ratio(c, d, axis)

    expected = scipy_stats.bootstrap(
        (*ours.T, *theirs.T),
        statistic,
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(7),
    ).confidence_interval
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.06 * width)
    assert found.high == pytest.approx(expected.high, abs=0.06 * width)


def test_mcnemar_is_the_binomial_test_of_the_changed_items():
    ours = np.array([True] * 12 + [False] * 3 + [True] * 30 + [False] * 9)
    theirs = np.array([False] * 12 + [True] * 3 + [True] * 30 + [False] * 9)
    tail = sum(scipy_stats.binom.pmf(k, 15, 0.5) for k in range(4))
    assert stats.mcnemar_p_value(ours, theirs) == pytest.approx(2 * tail)
    assert stats.mcnemar_p_value(ours, ours) == 1.0


def hits_by_id(right: int, n: int) -> dict[str, tuple[float, float]]:
    return {f"q{i}": (float(i < right), 1.0) for i in range(n)}


def test_two_runs_are_compared_on_their_common_items():
    found = stats.compare_runs(
        hits_by_id(70, 100), {**hits_by_id(40, 100), "other": (1.0, 1.0)}, margin=0.02, seed=0
    )
    assert (found.n, found.ours, found.theirs) == (100, 0.7, 0.4)
    assert found.difference.value == pytest.approx(0.3)
    assert found.p_value == pytest.approx(2 * 0.5**30)
    assert found.verdict == "higher"
    assert (
        stats.compare_runs(hits_by_id(40, 100), hits_by_id(70, 100), margin=0.02, seed=0).verdict
        == "lower"
    )
    assert (
        stats.compare_runs(hits_by_id(40, 100), hits_by_id(40, 100), margin=0.02, seed=0).verdict
        == "same"
    )
    assert (
        stats.compare_runs(hits_by_id(41, 100), hits_by_id(40, 100), margin=0.0, seed=0).verdict
        == "undecided"
    )
    tokens = {id: (3 * num + 1, 4.0) for id, (num, _) in hits_by_id(3, 20).items()}
    assert stats.compare_runs(tokens, tokens, margin=0.0, seed=0).p_value is None


def test_runs_without_a_common_item_are_an_error():
    with pytest.raises(ValueError, match="n > 0"):
        stats.compare_runs(hits_by_id(1, 2), {"other": (1.0, 1.0)}, margin=0.0, seed=0)
    with pytest.raises(ValueError, match="negative"):
        stats.compare_runs(hits_by_id(1, 2), hits_by_id(1, 2), margin=-0.1, seed=0)

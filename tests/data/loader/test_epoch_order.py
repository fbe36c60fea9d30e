import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from medgpt.data.loader.epoch_order import VALIDATION, WINDOW_TOKENS, mixed_order, plan_epoch
from medgpt.data.loader.packing import PlannedRows
from medgpt.data.tokenized.index import SampleIndex, num_chunks
from tests.data.loader.epochs import make_index, plan_whole_epoch, random_lengths


def chunk_keys(rows: PlannedRows) -> list[tuple[int, int]]:
    return list(zip(rows.sample.tolist(), rows.chunk.tolist(), strict=True))


def shares(index: SampleIndex, order: NDArray[np.int64], num_sources: int) -> NDArray[np.float64]:
    tokens = np.bincount(index.source[order], weights=index.length[order], minlength=num_sources)
    return tokens / tokens.sum()


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 200), max_size=40), min_size=1, max_size=3),
    st.integers(16, 64),
    st.integers(0, 99),
)
def test_an_epoch_trains_every_target_exactly_once(
    lengths: list[list[int]], max_length: int, seed: int
) -> None:
    index = make_index(*(np.array(source, np.int64) for source in lengths), block_rows=7)
    if not len(index):
        return
    rows = plan_whole_epoch(index, max_length=max_length, seed=seed)
    chunks = chunk_keys(rows)
    assert len(set(chunks)) == len(chunks) == num_chunks(index.length, max_length).sum()
    targets = [
        (sample, position)
        for sample, start, stop in zip(rows.sample, rows.start, rows.stop, strict=True)
        for position in range(start + 1, stop)
    ]
    expected = {(s, p) for s, length in enumerate(index.length) for p in range(1, length)}
    assert len(targets) == len(expected)
    assert set(targets) == expected


@settings(deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=60), st.integers(16, 64))
def test_rows_hold_every_token_of_the_index(lengths: list[int], max_length: int) -> None:
    index = make_index(np.array(lengths))
    rows = plan_whole_epoch(index, max_length=max_length)
    overlaps = int((rows.chunk > 0).sum())
    assert rows.num_tokens - overlaps == sum(lengths)


def test_seed_and_epoch_determine_the_order() -> None:
    index = make_index(random_lengths(500))
    first_plan = plan_whole_epoch(index, seed=1, epoch=1)
    assert chunk_keys(plan_whole_epoch(index, seed=1, epoch=1)) == chunk_keys(first_plan)
    for seed, epoch in ((1, 2), (2, 1), (1, VALIDATION)):
        other = plan_whole_epoch(index, seed=seed, epoch=epoch)
        assert chunk_keys(other) != chunk_keys(first_plan)
        assert sorted(chunk_keys(other)) == sorted(chunk_keys(first_plan))


def test_all_windows_together_hold_every_chunk_once() -> None:
    index = make_index(random_lengths(6000, median=1500), block_rows=100)
    assert index.length.sum() > 2 * WINDOW_TOKENS
    rows = plan_whole_epoch(index, max_length=2048)
    assert len(set(chunk_keys(rows))) == len(rows.sample) == num_chunks(index.length, 2048).sum()
    assert np.diff(rows.bounds).min() >= 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("weights", [(1, 1, 1), (0.1, 0.2, 0.7), (5, 94, 1)])
def test_source_shares_are_within_half_a_percent_of_the_weights(
    weights: tuple[float, ...], seed: int
) -> None:
    index = make_index(
        random_lengths(8000), random_lengths(900, sigma=1.5), random_lengths(40, median=90)
    )
    order = mixed_order(index, seed=seed, epoch=0, weights=np.array(weights))
    expected = np.array(weights) / sum(weights)
    assert np.abs(shares(index, order, 3) / expected - 1).max() < 0.005
    assert abs(index.length[order].sum() / index.length.sum() - 1) < 0.005


def test_a_few_very_long_documents_do_not_spoil_the_mix() -> None:
    lengths = np.array([200_000, 90_000, *random_lengths(3000)])
    index = make_index(lengths, random_lengths(3000))
    for seed in range(10):
        order = mixed_order(index, seed=seed, epoch=0, weights=np.array([0.3, 0.7]))
        assert np.abs(shares(index, order, 2) / [0.3, 0.7] - 1).max() < 0.005


def test_a_source_is_repeated_in_full_before_any_sample_is_repeated_again() -> None:
    index = make_index(random_lengths(2000), random_lengths(30))
    order = mixed_order(index, seed=3, epoch=0, weights=np.array([1.0, 1.0]))
    times = np.bincount(order, minlength=len(index))
    assert set(times[:2000]) == {0, 1}
    assert times[2000:].max() - times[2000:].min() == 1


def test_sources_are_evenly_mixed_throughout_the_epoch() -> None:
    index = make_index(random_lengths(5000), random_lengths(300), random_lengths(60))
    weights = np.array([0.5, 0.3, 0.2])
    for tenth in np.array_split(mixed_order(index, seed=0, epoch=2, weights=weights), 10):
        assert np.abs(shares(index, tenth, 3) - weights).max() < 0.06


def test_a_source_without_samples_does_not_change_the_shares_of_the_others() -> None:
    index = make_index(random_lengths(1000), random_lengths(1000), np.array([], np.int64))
    order = mixed_order(index, seed=0, epoch=0, weights=np.array([1.0, 3.0, 4.0]))
    assert np.abs(shares(index, order, 2) - [0.25, 0.75]).max() < 0.005


def test_a_single_document_is_picked_if_that_is_nearer_to_its_share() -> None:
    index = make_index(np.array([1000] * 10), np.array([1000]))
    for weights, times in (((94.0, 6.0), 1), ((96.0, 4.0), 0)):
        order = mixed_order(index, seed=0, epoch=0, weights=np.array(weights))
        assert (order == 10).sum() == times


def test_the_samples_of_a_block_are_read_together() -> None:
    index = make_index(random_lengths(1000), block_rows=50)
    blocks = index.block[mixed_order(index, seed=0, epoch=0, weights=None)]
    assert (np.diff(blocks) != 0).sum() == 19
    assert blocks[::50].tolist() != sorted(blocks[::50].tolist())


@pytest.mark.parametrize("seed", range(5))
def test_the_share_of_a_source_with_many_samples_is_exact_to_a_few_tokens(seed: int) -> None:
    index = make_index(random_lengths(1000), random_lengths(2000))
    order = mixed_order(index, seed=seed, epoch=0, weights=np.array([3.0, 1.0]))
    quota = index.length.sum() / 4
    assert abs(index.length[order[index.source[order] == 1]].sum() - quota) <= 2


def test_repeats_of_a_sample_are_numbered_within_the_epoch() -> None:
    index = make_index(random_lengths(200), random_lengths(20))
    rows = plan_whole_epoch(index, weights=np.array([1.0, 1.0]))
    first = rows.chunk == 0
    repeats: dict[int, list[int]] = {}
    for sample, repeat in zip(rows.sample[first], rows.repeat[first], strict=True):
        repeats.setdefault(int(sample), []).append(int(repeat))
    assert max(len(found) for found in repeats.values()) > 5
    assert all(sorted(found) == list(range(len(found))) for found in repeats.values())
    assert not plan_whole_epoch(index).repeat.any()


def test_an_empty_index_gives_an_epoch_without_rows() -> None:
    empty = make_index(np.array([], np.int64))
    assert list(plan_epoch(empty, max_length=16, seed=0, epoch=0, weights=None)) == []

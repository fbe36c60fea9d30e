import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medgpt.data.loader.packing import pack_best_fit
from medgpt.data.tokenized.index import num_chunks
from tests.data.loader.epochs import make_index, plan_whole_epoch, random_lengths


def test_num_chunks_accounts_for_the_overlap_of_one_token() -> None:
    length = np.array([1, 2, 16, 17, 31, 32, 46, 47])
    assert num_chunks(length, 16).tolist() == [1, 1, 1, 2, 2, 3, 3, 4]


@settings(deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=60), st.integers(16, 64))
def test_a_row_holds_at_most_max_length_tokens_and_at_least_one_chunk(
    lengths: list[int], max_length: int
) -> None:
    rows = plan_whole_epoch(make_index(np.array(lengths)), max_length=max_length)
    tokens = np.add.reduceat(rows.stop - rows.start, rows.bounds[:-1])
    assert tokens.max() <= max_length
    assert np.diff(rows.bounds).min() >= 1
    assert rows.bounds[0] == 0
    assert rows.bounds[-1] == len(rows.sample)


@pytest.mark.parametrize(
    ("median", "sigma", "max_length"),
    [(180, 0.6, 1024), (250, 0.9, 512), (900, 1.2, 1024), (60, 0.5, 256)],
)
def test_packed_rows_are_more_than_98_percent_full(
    median: float, sigma: float, max_length: int
) -> None:
    rows = plan_whole_epoch(
        make_index(random_lengths(20_000, median=median, sigma=sigma)), max_length=max_length
    )
    assert rows.num_tokens / (len(rows) * max_length) > 0.98


def test_best_fit_uses_the_fullest_row_with_room() -> None:
    # 7 and 6 open rows 0 and 1; 3 fits both and takes row 0 (7 + 3); 4 fills row 1; 1 opens row 2
    assert pack_best_fit(np.array([3, 7, 6, 4, 1]), 10).tolist() == [0, 0, 1, 1, 2]


def test_without_packing_every_sample_is_one_uncut_row() -> None:
    index = make_index(random_lengths(500))
    rows = plan_whole_epoch(index, max_length=None)
    assert sorted(rows.sample.tolist()) == list(range(500))
    assert rows.bounds.tolist() == list(range(501))
    assert not rows.start.any()
    assert (rows.stop == index.length[rows.sample]).all()
    assert rows.sample.tolist() != plan_whole_epoch(index, max_length=None, epoch=1).sample.tolist()

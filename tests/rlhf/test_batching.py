"""Shares, forward passes and mini-batches hold every sequence once."""

from itertools import chain

import numpy as np
import pytest

from medgpt.rlhf.batching import forward_passes, mini_batches, response_batch, split_by_length
from tests.rlhf.cases import sequences


def test_shares_computed_by_hand():
    """9 | 5; 9 | 5 + 4; 9 + 4 | 5 + 4; 9 + 4 | 5 + 4 + 1."""
    shares = split_by_length(np.array([5, 9, 1, 4, 4]), 2)
    assert [share.tolist() for share in shares] == [[1, 4], [0, 2, 3]]


@pytest.mark.parametrize("num_shares", [1, 2, 3, 7])
def test_shares_are_disjoint_and_balanced(num_shares):
    lengths = np.random.default_rng(0).integers(1, 100, 50)
    shares = split_by_length(lengths, num_shares)
    assert sorted(np.concatenate(shares)) == list(range(50))
    loads = [lengths[share].sum() for share in shares]
    assert max(loads) - min(loads) <= lengths.max()


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
@pytest.mark.parametrize("max_tokens", [1, 30, 10_000])
def test_all_ranks_make_equally_many_passes_and_cover_each_sequence_once(num_ranks, max_tokens):
    batch = sequences(9)
    rows = np.array([0, 2, 3, 5, 6, 7])
    per_rank = [
        list(forward_passes(batch, rows, rank=rank, num_ranks=num_ranks, max_tokens=max_tokens))
        for rank in range(num_ranks)
    ]
    assert len({len(passes) for passes in per_rank}) == 1
    batches = [forward.rows for passes in per_rank for forward in passes]
    assert sorted(np.concatenate(batches)) == rows.tolist()
    for forward in (f for passes in per_rank for f in passes):
        assert forward.batch.input_ids.shape[1] <= max_tokens or len(forward.rows) <= 1


def test_labels_are_the_next_response_tokens():
    batch = sequences(3)
    rows = np.array([2, 0])
    packed = response_batch(batch, rows)

    start = 0
    for row in rows:
        prompt, response = batch.prompts.row(row), batch.responses.row(row)
        stop = start + len(prompt) + len(response)
        want = [-100] * (len(prompt) - 1) + response.tolist() + [-100]
        assert packed.labels[0, start:stop].tolist() == want
        assert packed.input_ids[0, start:stop].tolist() == [*prompt, *response]
        assert packed.position_ids[0, start:stop].tolist() == list(range(stop - start))
        start = stop
    assert packed.cu_seqlens[-1] == start


def test_mini_batches_hold_each_row_once_per_epoch_in_a_fresh_order():
    def steps(**key):
        batches = mini_batches(10, 4, **{"seed": 0, "iteration": 0, "epoch": 0, **key})
        return [rows.tolist() for rows in batches]

    assert sorted(chain(*steps())) == list(range(10))
    assert [len(rows) for rows in steps()] == [4, 4, 2]
    assert steps() == steps()
    assert (
        len({str(steps(**key)) for key in ({}, {"seed": 1}, {"iteration": 1}, {"epoch": 1})}) == 4
    )

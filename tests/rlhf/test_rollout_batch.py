"""Ragged batches: shares in any order join to the batch, or are refused."""

import numpy as np
import pytest

from medgpt.artifacts import Folder
from medgpt.rlhf.checkpoint import read_sequences, write_sequences
from medgpt.rlhf.rollout_batch import Ragged, join_per_sequence, join_per_token, join_sequences
from tests.rlhf.cases import logprobs, sequences, share


def assert_equal(first, second) -> None:
    for name in ("index", "logprobs", "finished"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    for name in ("prompts", "responses"):
        one, other = getattr(first, name), getattr(second, name)
        np.testing.assert_array_equal(one.values, other.values)
        np.testing.assert_array_equal(one.offsets, other.offsets)
    assert first.sample_ids == second.sample_ids
    assert first.weight_version == second.weight_version


def test_ragged_rows_computed_by_hand():
    rows = Ragged.from_rows([[1, 2], [], [3, 4, 5]], np.int32)
    assert rows.lengths.tolist() == [2, 0, 3]
    assert rows.positions([2, 0]).tolist() == [2, 3, 4, 0, 1]
    assert rows.take([2, 1]).values.tolist() == [3, 4, 5]
    assert rows.take([2, 1]).offsets.tolist() == [0, 3, 3]
    assert rows.take([]).offsets.tolist() == [0]


def test_shares_in_any_order_join_to_the_whole():
    batch = sequences(7)
    parts = [share(batch, index) for index in ([6, 0, 3], [1, 5], [2, 4])]
    assert_equal(join_sequences(parts), batch)


@pytest.mark.parametrize("parts", [[[0, 1], [3]], [[0, 1, 2], [2, 3]], [[1, 2, 3, 4]]])
def test_incomplete_or_overlapping_shares_are_refused(parts):
    batch = sequences(5)
    with pytest.raises(ValueError, match="do not add up to the batch"):
        join_sequences([share(batch, part) for part in parts])


def test_outputs_of_shares_join_token_by_token():
    batch = sequences(5)
    parts = [logprobs(batch)]
    shares = [share(batch, index) for index in ([4, 1], [0, 2, 3])]
    split = [logprobs(part) for part in shares]
    for outputs in (parts, split, split[::-1]):
        np.testing.assert_array_equal(join_per_token(outputs, batch.responses), batch.logprobs)
    joined = join_per_sequence([(part.index, part.responses.lengths) for part in shares])
    np.testing.assert_array_equal(joined, batch.responses.lengths)


def test_rollouts_in_flight_survive_on_disk(tmp_path):
    batch = sequences(5)
    write_sequences(Folder(str(tmp_path)), batch)
    restored = read_sequences(Folder(str(tmp_path)))
    assert restored is not None
    assert_equal(restored, batch)

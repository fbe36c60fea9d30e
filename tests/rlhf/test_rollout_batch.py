"""Ragged batches: shares join to the whole, in any order, or are refused."""

import numpy as np
import pytest

from medgpt.artifacts import Folder
from medgpt.rlhf.rollout_batch import Ragged, join_rows, join_sequences, join_tokens
from medgpt.rlhf.state import read_sequences, write_sequences
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


def test_rows_by_hand():
    rows = Ragged.of([[1, 2], [], [3, 4, 5]], np.int32)
    assert rows.lengths.tolist() == [2, 0, 3]
    assert rows.places([2, 0]).tolist() == [2, 3, 4, 0, 1]
    assert rows.take([2, 1]).values.tolist() == [3, 4, 5]
    assert rows.take([2, 1]).offsets.tolist() == [0, 3, 3]
    assert rows.take([]).offsets.tolist() == [0]


def test_shares_in_any_order_join_to_the_whole():
    whole = sequences(7)
    parts = [share(whole, index) for index in ([6, 0, 3], [1, 5], [2, 4])]
    assert_equal(join_sequences(parts), whole)


@pytest.mark.parametrize("parts", [[[0, 1], [3]], [[0, 1, 2], [2, 3]], [[1, 2, 3, 4]]])
def test_shares_that_make_no_whole_are_refused(parts):
    whole = sequences(5)
    with pytest.raises(ValueError, match="do not make a whole batch"):
        join_sequences([share(whole, part) for part in parts])


def test_answers_of_shares_join_token_by_token():
    whole = sequences(5)
    parts = [logprobs(whole, "actor")]
    shares = [share(whole, index) for index in ([4, 1], [0, 2, 3])]
    split = [logprobs(part, "actor") for part in shares]
    for found in (parts, split, split[::-1]):
        np.testing.assert_array_equal(join_tokens(found, whole.responses), whole.logprobs)
    lengths = [part.responses.lengths for part in shares]
    found = join_rows([part.index for part in shares], lengths)
    np.testing.assert_array_equal(found, whole.responses.lengths)


def test_rollouts_in_flight_survive_on_disk(tmp_path):
    whole = sequences(5)
    write_sequences(Folder(str(tmp_path)), whole)
    found = read_sequences(Folder(str(tmp_path)))
    assert found is not None
    assert_equal(found, whole)

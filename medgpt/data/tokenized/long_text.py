"""Tokenizes long texts in windows: a tokenizer needs some 200 bytes of memory per character.

Windows overlap. They are joined at a character at which both begin a token, with equal tokens
around it, so that the ids are those of the whole text.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

WINDOW = 1 << 18  # characters
OVERLAP = 1 << 10  # characters
NUM_EQUAL = 4  # tokens before and after the place where two windows are joined


class Tokens(NamedTuple):
    """N tokens of a text without special tokens."""

    ids: NDArray[np.int32]  # (N,)
    starts: NDArray[np.int32]  # (N,) first characters


def tokenize_in_windows(
    tokenizer: PreTrainedTokenizerFast, text: str, *, window: int = WINDOW, overlap: int = OVERLAP
) -> Tokens:
    """Return the tokens of `text`, without special tokens."""
    ids: list[NDArray[np.int32]] = []
    starts: list[NDArray[np.int32]] = []
    pending: Tokens | None = None
    for start in _window_starts(len(text), window, overlap):
        tokens = _tokenize(tokenizer, text[start : start + window], start)
        joint = None if pending is None else _joint(pending, tokens, start, overlap)
        if pending is not None and joint is None:  # no common token: a text that is one word
            return _tokenize(tokenizer, text, 0)
        if pending is not None and joint is not None:
            ids.append(pending.ids[: joint[0]])
            starts.append(pending.starts[: joint[0]])
            tokens = Tokens(tokens.ids[joint[1] :], tokens.starts[joint[1] :])
        pending = tokens
    assert pending is not None
    return Tokens(np.concatenate([*ids, pending.ids]), np.concatenate([*starts, pending.starts]))


def _window_starts(length: int, window: int, overlap: int) -> Iterator[int]:
    yield 0
    yield from range(window - overlap, length - overlap, window - overlap)


def _tokenize(tokenizer: PreTrainedTokenizerFast, text: str, offset: int) -> Tokens:
    batch = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    starts = np.array(batch["offset_mapping"], np.int32).reshape(-1, 2)[:, 0]
    return Tokens(np.array(batch["input_ids"], np.int32), starts + np.int32(offset))


def _joint(left: Tokens, right: Tokens, start: int, overlap: int) -> tuple[int, int] | None:
    """Return how many tokens of `left` to keep and of `right` to drop, or None."""
    middle = start + overlap // 2
    common = np.intersect1d(left.starts, right.starts)
    for position in common[np.argsort(np.abs(common - middle), kind="stable")]:
        i, j = (int(np.searchsorted(side.starts, position)) for side in (left, right))
        around = [
            side.ids[max(0, k - NUM_EQUAL) : k + NUM_EQUAL] for side, k in ((left, i), (right, j))
        ]
        if len(around[0]) == 2 * NUM_EQUAL and np.array_equal(around[0], around[1]):
            return i, j
    return None

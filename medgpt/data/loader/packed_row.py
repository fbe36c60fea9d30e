"""A packed row with its tokens: what a stream yields and batches are made of.

Light on purpose: a worker that is given rows does without Ray Data.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class PackedRow:
    """A packed row of C chunks with N tokens."""

    input_ids: NDArray[np.int32]  # (N,)
    targets: NDArray[np.bool_]  # (N,) True where the token is to be learnt
    word_ids: NDArray[np.int32] | None  # (N,)
    lengths: NDArray[np.int64]  # (C,) tokens of each chunk
    sample_ids: list[str]  # (C,)
    chunks: list[int]  # (C,)
    repeat: list[int]  # (C,) how often the epoch had the sample before
    sequence_lengths: NDArray[np.int32] | None = (
        None  # (K,) tokens of each answer with its prompt, then C = 1
    )
    grades: NDArray[np.float32] | None = None  # (K,) of the answers
    messages: str | None = None  # JSON of [role, content] pairs of a prompt, then C = 1

"""A packed row with its tokens, as streams yield it and batches are collated from it.

Kept apart from stream.py so that a worker that only receives rows need not import Ray Data.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class PackedRow:
    """A packed row of C chunks with N tokens."""

    input_ids: NDArray[np.int32]  # (N,)
    targets: NDArray[np.bool_]  # (N,) True where the loss counts
    word_ids: NDArray[np.int32] | None  # (N,) number of the word, -1 = none
    lengths: NDArray[np.int64]  # (C,) tokens of each chunk
    sample_ids: list[str]  # (C,)
    chunks: list[int]  # (C,) number of the chunk within its sample
    repeat: list[int]  # (C,) earlier occurrences of the sample in the epoch
    sequence_lengths: NDArray[np.int32] | None = (
        None  # (K,) tokens of each answer with its prompt, then C = 1
    )
    grades: NDArray[np.float32] | None = None  # (K,) grade of each answer
    messages: str | None = None  # JSON of [role, content] pairs of a prompt, then C = 1

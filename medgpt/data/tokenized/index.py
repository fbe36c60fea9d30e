"""Index of all samples: their lengths, and the location of their tokens."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SampleIndex:
    """Columns with one entry per sample, in file order; N samples."""

    length: IntArray  # (N,) tokens
    source: IntArray  # (N,) number of the source in the config
    block: IntArray  # (N,) number of the block (a row group of a shard) that holds the tokens
    row: IntArray  # (N,) row inside the block
    sample_id: NDArray[np.bytes_]  # (N,) 32 hexadecimal characters

    def __len__(self) -> int:
        return len(self.length)


def num_chunks(length: IntArray, max_length: int | None) -> IntArray:
    """Return (N,) numbers of chunks per sample; consecutive chunks overlap by one token."""
    if max_length is None:
        return np.ones_like(length)
    return np.maximum(1, -(-(length - 1) // (max_length - 1)))

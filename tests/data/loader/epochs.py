"""Indexes without tokens, and the packed rows of an epoch over them."""

import numpy as np
from numpy.typing import NDArray

from medgpt.data.loader.epoch_order import plan_epoch
from medgpt.data.loader.packing import PlannedRows
from medgpt.data.tokenized.index import SampleIndex


def make_index(*sources: NDArray[np.int64], block_rows: int = 50) -> SampleIndex:
    """Samples of the given lengths, one array for each source."""
    length = np.concatenate(sources)
    number = np.arange(len(length))
    return SampleIndex(
        length=length,
        source=np.repeat(np.arange(len(sources)), [len(lengths) for lengths in sources]),
        block=number // block_rows,
        row=number % block_rows,
        sample_id=np.array([f"{i:032x}" for i in number], dtype="S32"),
    )


def random_lengths(
    num_samples: int, *, median: float = 200, sigma: float = 0.8
) -> NDArray[np.int64]:
    rng = np.random.default_rng(num_samples)
    return np.maximum(1, rng.lognormal(np.log(median), sigma, num_samples)).astype(np.int64)


def plan_whole_epoch(
    index: SampleIndex,
    *,
    max_length: int | None = 128,
    seed: int = 0,
    epoch: int = 0,
    weights: NDArray[np.float64] | None = None,
) -> PlannedRows:
    """All windows of an epoch as one."""
    windows = list(
        plan_epoch(index, max_length=max_length, seed=seed, epoch=epoch, weights=weights)
    )
    ends = np.cumsum([0, *(part.bounds[-1] for part in windows)])
    bounds = [part.bounds[:-1] + end for part, end in zip(windows, ends, strict=False)]
    return PlannedRows(
        bounds=np.concatenate([*bounds, ends[-1:]]),
        **{
            name: np.concatenate([vars(part)[name] for part in windows])
            for name in ("sample", "repeat", "chunk", "start", "stop")
        },
    )

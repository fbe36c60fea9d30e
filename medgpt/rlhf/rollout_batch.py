"""Records that the roles exchange: ragged batches as flat arrays, which Ray moves without copies.

Shapes: B sequences of an iteration, b in one worker's share; N response tokens in all, n in a
share. `index` holds the positions of a share's sequences in the iteration's batch.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from medgpt.data.loader.packed_row import PackedRow

if TYPE_CHECKING:
    from medgpt.rlhf.rewards.weighted_sum import RewardResult

NO_VERSION = -1
"""Weight version before the first sync, during a sync, and of batches of several versions."""
RowIndex = Sequence[int] | NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Ragged:
    """Rows of different lengths, concatenated."""

    values: NDArray[Any]  # (N,)
    offsets: NDArray[np.int64]  # (B + 1,) row i is values[offsets[i] : offsets[i + 1]]

    @staticmethod
    def from_rows(rows: Sequence[Sequence[Any] | NDArray[Any]], dtype: Any) -> "Ragged":
        offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
        values = np.concatenate([np.asarray(row, dtype) for row in rows] or [np.empty(0, dtype)])
        return Ragged(values, offsets)

    @staticmethod
    def concatenate(parts: Sequence["Ragged"]) -> "Ragged":
        offsets = np.append(0, np.concatenate([part.lengths for part in parts]).cumsum())
        return Ragged(np.concatenate([part.values for part in parts]), offsets)

    @property
    def lengths(self) -> NDArray[np.int64]:  # (B,)
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, i: int) -> NDArray[Any]:
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def positions(self, rows: RowIndex) -> NDArray[np.int64]:
        """(n,) positions of these rows' values in `values`, row after row."""
        spans = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in rows]
        return np.concatenate(spans or [np.empty(0, np.int64)])

    def take(self, rows: RowIndex) -> "Ragged":
        lengths = self.lengths[np.asarray(rows, np.int64)]
        return Ragged(self.values[self.positions(rows)], np.append(0, np.cumsum(lengths)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """The B prompts of an iteration."""

    sample_ids: list[str]
    ids: Ragged  # int32, up to the start of the answer
    messages: list[str]  # the prompts as text, see records.prompt_to_json
    epoch: int = 0  # pass over the prompts

    def __len__(self) -> int:
        return len(self.sample_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """Prompts and the responses that a rollout worker sampled."""

    index: NDArray[np.int64]  # (b,)
    sample_ids: list[str]
    prompts: Ragged  # int32
    responses: Ragged  # int32, with the end token if one was sampled; may be empty
    logprobs: NDArray[np.float32]  # (n,) of the response tokens, at sampling time
    finished: NDArray[np.bool_]  # (b,) whether the response has an end token
    weight_version: int  # of the policy that sampled

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(b,) tokens of prompt and response."""
        return self.prompts.lengths + self.responses.lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprobs:
    """Log-probabilities of the responses' tokens under one model."""

    index: NDArray[np.int64]  # (b,)
    values: NDArray[np.float32]  # (n,) in the order of `index`
    entropy: float  # sum over the n tokens, in nats


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """The critic's values before each response token and after the last one."""

    index: NDArray[np.int64]  # (b,)
    values: NDArray[np.float32]  # (n,) in the order of `index`
    bootstrap: NDArray[np.float32]  # (b,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The reward of each response; nan where a component failed."""

    index: NDArray[np.int64]  # (b,)
    totals: NDArray[np.float32]  # (b,)
    rewards: "RewardResult"  # with all components


@dataclass(frozen=True, slots=True, kw_only=True)
class PtxBatch:
    """Packed rows of PPO-ptx for each optimizer step of an iteration."""

    steps: list[list[PackedRow]]


def join_sequences(parts: Iterable[Sequences]) -> Sequences:
    """Return the whole batch, in order. Raises ValueError if the shares are incomplete, overlap or
    come from different weight versions."""
    parts = list(parts)
    order = _batch_order(np.concatenate([part.index for part in parts]))
    versions = {part.weight_version for part in parts}
    if len(versions) != 1:
        raise ValueError(f"rollout workers sampled with different weight versions: {versions}")
    ids = [sample_id for part in parts for sample_id in part.sample_ids]
    responses = Ragged.concatenate([part.responses for part in parts])
    logprobs = np.concatenate([part.logprobs for part in parts])
    return Sequences(
        index=np.arange(len(order)),
        sample_ids=[ids[i] for i in order],
        prompts=Ragged.concatenate([part.prompts for part in parts]).take(order),
        responses=responses.take(order),
        logprobs=logprobs[responses.positions(order)],
        finished=np.concatenate([part.finished for part in parts])[order],
        weight_version=versions.pop(),
    )


def join_per_token(
    parts: Sequence[Logprobs] | Sequence[Values], responses: Ragged
) -> NDArray[np.float32]:
    """(N,) values of all shares in the order of the batch's response tokens."""
    index = np.concatenate([part.index for part in parts])
    _batch_order(index)  # raises if the shares are incomplete
    joined = np.empty(len(responses.values), np.float32)
    joined[responses.positions(index)] = np.concatenate([part.values for part in parts])
    return joined


def join_per_sequence(shares: Sequence[tuple[NDArray[np.int64], NDArray[Any]]]) -> NDArray[Any]:
    """(B,) numbers in the order of the batch, from the index and the numbers of each share."""
    index, numbers = zip(*shares, strict=True)
    return np.concatenate(numbers)[_batch_order(np.concatenate(index))]


def sample_seeds(seed: int, iteration: int, sample_ids: Sequence[str]) -> list[int]:
    """(B,) one random seed per response, whichever worker samples it. Repeats of a sample within a
    batch get different seeds."""
    repeats, seeds = Counter[str](), []
    for sample_id in sample_ids:
        key = f"{seed} {iteration} {sample_id}"
        suffix = f"\0{repeats[sample_id]}" if repeats[sample_id] else ""
        seeds.append(xxhash.xxh3_64_intdigest(f"{key}{suffix}".encode()) >> 1)
        repeats[sample_id] += 1
    return seeds


def _batch_order(index: NDArray[np.int64]) -> NDArray[np.int64]:
    order = np.argsort(index, kind="stable")
    if not np.array_equal(index[order], np.arange(len(index))):
        raise ValueError("the workers' shares do not add up to the batch")
    return order

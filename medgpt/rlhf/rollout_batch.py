"""What flows between the roles: ragged batches as flat arrays, which Ray moves without copies.

Shapes: B sequences of an iteration, b of them in one worker's share, N response tokens in all, n of
a share. A part names the sequences it is about by `index`, their places in the iteration's batch.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from medgpt.data.loader.packed_row import PackedRow

if TYPE_CHECKING:
    from medgpt.rlhf.rewards.weighted_sum import RewardResult

RowIndex = Sequence[int] | NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Ragged:
    """Rows of different length, end to end."""

    values: NDArray[Any]  # (N,)
    offsets: NDArray[np.int64]  # (B + 1,) row i is values[offsets[i] : offsets[i + 1]]

    @staticmethod
    def from_rows(rows: Sequence[Sequence[Any] | NDArray[Any]], dtype: Any) -> "Ragged":
        offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
        values = np.concatenate([np.asarray(row, dtype) for row in rows] or [np.empty(0, dtype)])
        return Ragged(values, offsets)

    @property
    def lengths(self) -> NDArray[np.int64]:  # (B,)
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, i: int) -> NDArray[Any]:
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def positions(self, rows: RowIndex) -> NDArray[np.int64]:
        """(n,) where the values of these rows are, row after row."""
        spans = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in rows]
        return np.concatenate(spans or [np.empty(0, np.int64)])

    def take(self, rows: RowIndex) -> "Ragged":
        lengths = self.lengths[np.asarray(rows, np.int64)]
        return Ragged(self.values[self.positions(rows)], np.append(0, np.cumsum(lengths)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """What an iteration asks: B prompts."""

    sample_ids: list[str]
    ids: Ragged  # int32, up to where the answer begins
    messages: list[str]  # JSON of [[role, content], ...], the same as text
    epoch: int = 0  # pass over the prompts

    def __len__(self) -> int:
        return len(self.sample_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """Prompts and what a rollout worker answered to them."""

    index: NDArray[np.int64]  # (b,)
    sample_ids: list[str]
    prompts: Ragged  # int32
    responses: Ragged  # int32, with the end token where there is one; an empty one is no error
    logprobs: NDArray[np.float32]  # (n,) of the responses' tokens when they were sampled
    finished: NDArray[np.bool_]  # (b,) the response has an end token
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

    model: Literal["actor", "reference"]  # the actor as it was before the updates
    index: NDArray[np.int64]  # (b,)
    values: NDArray[np.float32]  # (n,) in the order of `index`
    entropy: float  # sum over the n tokens, in nats


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """The critic's expectation before each response token, and after the last one."""

    index: NDArray[np.int64]  # (b,)
    values: NDArray[np.float32]  # (n,) in the order of `index`
    bootstrap: NDArray[np.float32]  # (b,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What each response is worth; nan where a component of the reward failed."""

    index: NDArray[np.int64]  # (b,)
    totals: NDArray[np.float32]  # (b,)
    rewards: "RewardResult"  # of which components they are made


@dataclass(frozen=True, slots=True, kw_only=True)
class PtxBatch:
    """Rows of the second stream of PPO-ptx for each optimizer step of an iteration."""

    steps: list[list[PackedRow]]


def join_sequences(parts: Iterable[Sequences]) -> Sequences:
    """The whole batch, in order. Raises ValueError if the parts make no whole, or are of weights
    of different versions."""
    parts = list(parts)
    order = _batch_order(np.concatenate([part.index for part in parts]))
    versions = {part.weight_version for part in parts}
    if len(versions) != 1:
        raise ValueError(f"rollout workers have sampled with weights of versions {versions}")
    ids = [sample_id for part in parts for sample_id in part.sample_ids]
    responses = _concatenate([part.responses for part in parts])
    logprobs = np.concatenate([part.logprobs for part in parts])
    return Sequences(
        index=np.arange(len(order)),
        sample_ids=[ids[i] for i in order],
        prompts=_concatenate([part.prompts for part in parts]).take(order),
        responses=responses.take(order),
        logprobs=logprobs[responses.positions(order)],
        finished=np.concatenate([part.finished for part in parts])[order],
        weight_version=versions.pop(),
    )


def join_per_token(
    parts: Sequence[Logprobs] | Sequence[Values], responses: Ragged
) -> NDArray[np.float32]:
    """(N,) the parts' values in the order of the whole batch's response tokens."""
    index = np.concatenate([part.index for part in parts])
    _batch_order(index)  # checks that they make a whole
    joined = np.empty(len(responses.values), np.float32)
    joined[responses.positions(index)] = np.concatenate([part.values for part in parts])
    return joined


def join_per_sequence(
    index: Sequence[NDArray[np.int64]], rows: Sequence[NDArray[Any]]
) -> NDArray[Any]:
    """(B,) numbers of whole sequences, in the order of the batch."""
    return np.concatenate(rows)[_batch_order(np.concatenate(index))]


def sample_seeds(seed: int, iteration: int, sample_ids: Sequence[str]) -> list[int]:
    """(B,) of all randomness in each response, whichever worker samples it. A sample that a batch
    visits again gets another one."""
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
        raise ValueError("the workers' shares do not make a whole batch")
    return order


def _concatenate(parts: Sequence[Ragged]) -> Ragged:
    lengths = np.concatenate([part.lengths for part in parts])
    return Ragged(np.concatenate([part.values for part in parts]), np.append(0, lengths.cumsum()))

"""Answer calls of several trials to a shared pool as one batch. Runs in the workers of the pool.

The sequences of all waiting trials fill the same forward passes. Up to rounding, a trial gets the
same results as from a call of its own.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medgpt.rlhf.rollout_batch import (
    NO_VERSION,
    Logprobs,
    Prompts,
    Ragged,
    Scores,
    Sequences,
    join_sequences,
)

if TYPE_CHECKING:
    from medgpt.rlhf.rewards.weighted_sum import RewardResult
    from medgpt.rlhf.roles.reference import Reference
    from medgpt.rlhf.roles.reward import Reward

Indices = NDArray[np.int64]


def score(role: "Reward", counts: Sequence[int], *args: Any) -> list[Scores]:
    """Return `Reward.score` of each request; `counts` is the number of `args` of each."""
    requests = _split_requests(counts, args)
    if len(requests) == 1:
        return [role.score(*requests[0])]
    batches = [join_sequences(rollouts) for _, *rollouts in requests]
    scores = role.score(
        _stack_prompts([prompts for prompts, *_ in requests]), stack_sequences(batches)
    )
    return [
        Scores(index=index, totals=scores.totals[rows], rewards=_select_rows(scores.rewards, rows))
        for index, rows in _rows_by_batch(scores.index, batches)
    ]


def judge_scores(
    role: "Reward", counts: Sequence[int], *args: Any
) -> list[tuple[NDArray[np.int64], list[float]]]:
    """Return `Reward.judge_scores` of each request."""
    batches = [join_sequences(answers) for answers in _split_requests(counts, args)]
    index, scores = role.judge_scores(stack_sequences(batches))
    return [
        (batch_index, [scores[row] for row in rows])
        for batch_index, rows in _rows_by_batch(index, batches)
    ]


def logprobs(
    role: "Reference", temperature: float, counts: Sequence[int], *args: Any
) -> list[Logprobs]:
    """Return `Reference.logprobs` of each request."""
    batches = [join_sequences(rollouts) for rollouts in _split_requests(counts, args)]
    stacked = stack_sequences(batches)
    stacked_logprobs = role.logprobs(temperature, stacked)
    lengths = stacked.responses.lengths[stacked_logprobs.index]
    values = Ragged(stacked_logprobs.values, np.append(0, np.cumsum(lengths)))
    return [
        Logprobs(index=index, values=values.take(rows).values, entropy=0.0)
        for index, rows in _rows_by_batch(stacked_logprobs.index, batches)
    ]


def stack_sequences(batches: Sequence[Sequences]) -> Sequences:
    """Stack the sequences of several batches, as sampled by no version of the weights."""
    starts = accumulate(map(len, batches), initial=0)
    return join_sequences(
        replace(batch, index=batch.index + start, weight_version=NO_VERSION)
        for batch, start in zip(batches, starts, strict=False)
    )


def _split_requests(counts: Sequence[int], args: Sequence[Any]) -> list[Sequence[Any]]:
    assert sum(counts) == len(args)
    return [args[start:stop] for start, stop in pairwise(accumulate(counts, initial=0))]


def _rows_by_batch(index: Indices, batches: Sequence[Sequences]) -> list[tuple[Indices, Indices]]:
    """For each batch, return the rows that this rank holds: their indices in the batch, and their
    positions among all rows of the rank."""
    bounds = pairwise(accumulate(map(len, batches), initial=0))
    positions = [
        (start, np.flatnonzero((index >= start) & (index < stop))) for start, stop in bounds
    ]
    return [(index[rows] - start, rows) for start, rows in positions]


def _stack_prompts(parts: Sequence[Prompts]) -> Prompts:
    return Prompts(
        sample_ids=[sample_id for part in parts for sample_id in part.sample_ids],
        ids=Ragged.concatenate([part.ids for part in parts]),
        messages=[text for part in parts for text in part.messages],
    )


def _select_rows(rewards: "RewardResult", rows: Indices) -> "RewardResult":
    """Return the rewards of some samples."""

    def pick(values: Sequence[Any]) -> list[Any]:
        return [values[row] for row in rows]

    return type(rewards)(
        totals=pick(rewards.totals),
        components={name: pick(values) for name, values in rewards.components.items()},
        violations={name: pick(values) for name, values in rewards.violations.items()},
        empty=pick(rewards.empty),
        capped=pick(rewards.capped),
    )

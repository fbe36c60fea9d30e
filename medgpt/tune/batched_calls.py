"""What several trials ask of a shared pool, answered together. Runs in the pool's workers.

Trials that wait at the same time are one batch: their sequences fill the same forward passes. What
each gets does not depend on who else asks, but for rounding.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medgpt.rlhf.rollout_batch import Logprobs, Prompts, Ragged, Scores, Sequences, join_sequences

if TYPE_CHECKING:
    from medgpt.rlhf.rewards.total import Rewarded
    from medgpt.rlhf.roles.reference import Reference
    from medgpt.rlhf.roles.reward import Reward

Rows = NDArray[np.int64]


def score(role: "Reward", counts: Sequence[int], *args: Any) -> list[Scores]:
    """`Reward.score` of each request; `counts` says how many of `args` each has."""
    requests = _requests(counts, args)
    if len(requests) == 1:
        return [role.score(*requests[0])]
    wholes = [join_sequences(rollouts) for _, *rollouts in requests]
    found = role.score(_stack_prompts([prompts for prompts, *_ in requests]), stack(wholes))
    return [
        Scores(index=index, totals=found.totals[rows], rewarded=_take(found.rewarded, rows))
        for index, rows in _shares(found.index, wholes)
    ]


def judge(
    role: "Reward", counts: Sequence[int], *args: Any
) -> list[tuple[NDArray[np.int64], list[float]]]:
    """`Reward.judge` of each request."""
    wholes = [join_sequences(answers) for answers in _requests(counts, args)]
    index, scores = role.judge(stack(wholes))
    return [(mine, [scores[row] for row in rows]) for mine, rows in _shares(index, wholes)]


def logprobs(
    role: "Reference", counts: Sequence[int], *args: Any, temperature: float
) -> list[Logprobs]:
    """`Reference.logprobs` of each request."""
    wholes = [join_sequences(rollouts) for rollouts in _requests(counts, args)]
    whole = stack(wholes)
    found = role.logprobs(temperature, whole)
    lengths = whole.responses.lengths[found.index]
    values = Ragged(found.values, np.append(0, np.cumsum(lengths)))
    return [
        Logprobs(of=found.of, index=index, values=values.take(rows).values, entropy=0.0)
        for index, rows in _shares(found.index, wholes)
    ]


def stack(wholes: Sequence[Sequences]) -> Sequences:
    """All sequences of several batches as one batch, which no version of weights has sampled."""
    return Sequences(
        index=np.arange(sum(map(len, wholes))),
        sample_ids=[sample_id for whole in wholes for sample_id in whole.sample_ids],
        prompts=_stack([whole.prompts for whole in wholes]),
        responses=_stack([whole.responses for whole in wholes]),
        logprobs=np.concatenate([whole.logprobs for whole in wholes]),
        finished=np.concatenate([whole.finished for whole in wholes]),
        weight_version=-1,
    )


def _requests(counts: Sequence[int], args: Sequence[Any]) -> list[Sequence[Any]]:
    assert sum(counts) == len(args)
    return [args[start:stop] for start, stop in pairwise(accumulate(counts, initial=0))]


def _shares(index: Rows, wholes: Sequence[Sequences]) -> list[tuple[Rows, Rows]]:
    """For each batch, this rank's rows in it, and where they are among all rows of this rank."""
    bounds = pairwise(accumulate(map(len, wholes), initial=0))
    found = [(start, np.flatnonzero((index >= start) & (index < stop))) for start, stop in bounds]
    return [(index[rows] - start, rows) for start, rows in found]


def _stack_prompts(parts: Sequence[Prompts]) -> Prompts:
    return Prompts(
        sample_ids=[sample_id for part in parts for sample_id in part.sample_ids],
        ids=_stack([part.ids for part in parts]),
        messages=[text for part in parts for text in part.messages],
    )


def _stack(parts: Sequence[Ragged]) -> Ragged:
    lengths = np.concatenate([part.lengths for part in parts])
    return Ragged(np.concatenate([part.values for part in parts]), np.append(0, lengths.cumsum()))


def _take(rewarded: "Rewarded", rows: Rows) -> "Rewarded":
    """Those of some samples."""

    def pick(values: Sequence[Any]) -> list[Any]:
        return [values[row] for row in rows]

    return type(rewarded)(
        totals=pick(rewarded.totals),
        components={name: pick(values) for name, values in rewarded.components.items()},
        violations={name: pick(values) for name, values in rewarded.violations.items()},
        empty=pick(rewarded.empty),
        capped=pick(rewarded.capped),
    )

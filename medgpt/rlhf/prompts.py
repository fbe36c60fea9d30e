"""The prompts of each iteration, in the order that the plan of the run says."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import numpy as np

from medgpt.data.plan import Plan
from medgpt.data.stream import Step, training_stream
from medgpt.rlhf.experience import Prompts, Ragged

T = TypeVar("T")


class Cursor(Generic[T]):
    """What a stream has for an iteration; it begins anew where that is not the next one, as after a
    rewind or for a batch that is done again."""

    def __init__(self, begin: Callable[[int], Iterator[T]]) -> None:
        """`begin` yields what belongs to an iteration and to all after it."""
        self._begin, self._at = begin, -1
        self._stream: Iterator[T] = iter(())

    def take(self, iteration: int) -> T:
        if self._at != iteration:
            self._stream, self._at = self._begin(iteration), iteration
        self._at += 1
        return next(self._stream)


def prompt_stream(plan: Plan, data_url: str, start: int, *, data_cpus: float) -> Iterator[Prompts]:
    """Those of iteration `start` and all after it."""
    steps = training_stream(plan, data_url, rank=0, world_size=1, start=start, data_cpus=data_cpus)
    return map(as_prompts, steps)


def as_prompts(step: Step) -> Prompts:
    return Prompts(
        sample_ids=[row.sample_ids[0] for row in step.rows],
        ids=Ragged.of([row.input_ids for row in step.rows], np.int32),
        messages=[row.messages or "[]" for row in step.rows],
        epoch=step.epoch,
    )

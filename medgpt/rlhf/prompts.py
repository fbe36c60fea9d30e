"""The prompts of each iteration, in the order that the plan of the run says."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from threading import Thread
from typing import Generic, TypeVar

import numpy as np

from medgpt.config.base import ConfigError
from medgpt.data.loader.plan import Plan
from medgpt.data.loader.stream import Step, training_stream
from medgpt.rlhf.rollout_batch import Prompts, Ragged

T = TypeVar("T")
SAID_AFTER_S = 30.0  # a wait that takes longer is told


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


def prompt_stream(
    plan: Plan,
    data_url: str,
    start: int,
    *,
    data_cpus: float,
    wait_s: float,
    say: Callable[[str], None],
) -> Iterator[Prompts]:
    """Those of iteration `start` and all after it, each `within` that time."""
    steps = training_stream(plan, data_url, rank=0, world_size=1, start=start, data_cpus=data_cpus)
    return within(map(as_prompts, steps), "prompts", wait_s=wait_s, say=say)


def within(
    stream: Iterator[T],
    what: str,
    *,
    wait_s: float,
    say: Callable[[str], None],
    said_after_s: float = SAID_AFTER_S,
) -> Iterator[T]:
    """The same stream. Ray Data waits in silence, and for ever, for a CPU that the pools hold.

    Raises:
        ConfigError: the next of `what` did not come in `wait_s`.
    """
    said_after_s = min(wait_s, said_after_s)
    while (found := _awaited(stream, what, wait_s, said_after_s, say)) is not None:
        yield found


def _awaited(
    stream: Iterator[T], what: str, wait_s: float, said_after_s: float, say: Callable[[str], None]
) -> T | None:
    """None at the end."""
    found: Future[T | None] = Future()
    Thread(target=_resolve, args=(found, stream), daemon=True).start()
    if not wait([found], timeout=said_after_s).done:
        say(f"{what}: waiting up to {wait_s:g} s for the data tasks")
        if not wait([found], timeout=wait_s - said_after_s).done:
            raise ConfigError(
                f"cluster.wait_s={wait_s:g}: no {what} came in this time; a data task needs "
                "cluster.data_cpus on one node beside the pools: use fewer or smaller workers in "
                "[pools], or a larger cluster"
            )
    return found.result()


def _resolve(found: Future[T | None], stream: Iterator[T]) -> None:
    try:
        found.set_result(next(stream, None))
    except BaseException as error:  # it is the driver's
        found.set_exception(error)


def as_prompts(step: Step) -> Prompts:
    return Prompts(
        sample_ids=[row.sample_ids[0] for row in step.rows],
        ids=Ragged.of([row.input_ids for row in step.rows], np.int32),
        messages=[row.messages or "[]" for row in step.rows],
        epoch=step.epoch,
    )

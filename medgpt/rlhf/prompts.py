"""The prompts of each iteration, in the order that the plan of the run says."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from threading import Thread
from typing import Generic, TypeVar

import numpy as np

from medgpt.config.base import ConfigError
from medgpt.data.loader.plan import Plan
from medgpt.data.loader.stream import StepRows, training_stream
from medgpt.rlhf.rollout_batch import Prompts, Ragged

T = TypeVar("T")
LOG_AFTER_S = 30.0  # a wait that takes longer is told


class SeekableStream(Generic[T]):
    """What a stream has for an iteration; it begins anew where that is not the next one, as after a
    rewind or for a batch that is done again."""

    def __init__(self, open_at: Callable[[int], Iterator[T]]) -> None:
        """`begin` yields what belongs to an iteration and to all after it."""
        self._open_at, self._position = open_at, -1
        self._stream: Iterator[T] = iter(())

    def take(self, iteration: int) -> T:
        if self._position != iteration:
            self._stream, self._position = self._open_at(iteration), iteration
        self._position += 1
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
    return with_timeout(map(to_prompts, steps), "prompts", wait_s=wait_s, say=say)


def with_timeout(
    stream: Iterator[T],
    name: str,
    *,
    wait_s: float,
    say: Callable[[str], None],
    log_after_s: float = LOG_AFTER_S,
) -> Iterator[T]:
    """The same stream. Ray Data waits in silence, and for ever, for a CPU that the pools hold.

    Raises:
        ConfigError: the next of `what` did not come in `wait_s`.
    """
    log_after_s = min(wait_s, log_after_s)
    while (value := _next_or_timeout(stream, name, wait_s, log_after_s, say)) is not None:
        yield value


def _next_or_timeout(
    stream: Iterator[T], name: str, wait_s: float, log_after_s: float, say: Callable[[str], None]
) -> T | None:
    """None at the end."""
    future: Future[T | None] = Future()
    Thread(target=_resolve, args=(future, stream), daemon=True).start()
    if not wait([future], timeout=log_after_s).done:
        say(f"{name}: waiting up to {wait_s:g} s for the data tasks")
        if not wait([future], timeout=wait_s - log_after_s).done:
            raise ConfigError(
                f"cluster.wait_s={wait_s:g}: no {name} came in this time; a data task needs "
                "cluster.data_cpus on one node beside the pools: use fewer or smaller workers in "
                "[pools], or a larger cluster"
            )
    return future.result()


def _resolve(future: Future[T | None], stream: Iterator[T]) -> None:
    try:
        future.set_result(next(stream, None))
    except BaseException as error:  # it is the driver's
        future.set_exception(error)


def to_prompts(step: StepRows) -> Prompts:
    return Prompts(
        sample_ids=[row.sample_ids[0] for row in step.rows],
        ids=Ragged.from_rows([row.input_ids for row in step.rows], np.int32),
        messages=[row.messages or "[]" for row in step.rows],
        epoch=step.epoch,
    )

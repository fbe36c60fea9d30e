"""Prompt stream: the prompts of each iteration in the order of the run's plan."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from threading import Thread
from typing import Generic, TypeVar

import numpy as np

from medgpt.cluster.wait_for_resources import waiting_line
from medgpt.config.base import ConfigError
from medgpt.data.loader.plan import Plan
from medgpt.data.loader.stream import StepRows, training_stream
from medgpt.rlhf.rollout_batch import Prompts, Ragged

T = TypeVar("T")
LOG_AFTER_S = 30.0  # log a wait that takes longer


class SeekableStream(Generic[T]):
    """A stream that can be read at any iteration; it is reopened unless that is the next one."""

    def __init__(self, open_at: Callable[[int], Iterator[T]]) -> None:
        """`open_at(iteration)` yields the items of this iteration and all later ones."""
        self.open_at, self._position = open_at, -1
        self._stream: Iterator[T] = iter(())

    def take(self, iteration: int) -> T:
        if self._position != iteration:
            self._stream, self._position = self.open_at(iteration), iteration
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
    """Yield the prompts from iteration `start` on. Raises ConfigError after `wait_s`."""
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
    """Yield from `stream` with a timeout: Ray Data waits forever for a CPU that the pools hold.

    Raises:
        ConfigError: the next item did not arrive within `wait_s`.
    """
    log_after_s = min(wait_s, log_after_s)
    while (value := _next_or_timeout(stream, name, wait_s, log_after_s, say)) is not None:
        yield value


def _next_or_timeout(
    stream: Iterator[T], name: str, wait_s: float, log_after_s: float, say: Callable[[str], None]
) -> T | None:
    """Return the next item, or None at the end of the stream."""
    future: Future[T | None] = Future()
    Thread(target=_resolve, args=(future, stream), daemon=True).start()
    if not wait([future], timeout=log_after_s).done:
        say(f"{name}: {waiting_line(wait_s, 'the data tasks')}")
        if not wait([future], timeout=wait_s - log_after_s).done:
            raise ConfigError(
                f"cluster.wait_s={wait_s:g}: no {name} arrived within this time; a data task needs "
                "cluster.data_cpus on one node beside the pools: use fewer or smaller workers in "
                "[pools], or a larger cluster"
            )
    return future.result()


def _resolve(future: Future[T | None], stream: Iterator[T]) -> None:
    try:
        future.set_result(next(stream, None))
    except BaseException as error:  # raised in the driver by result()
        future.set_exception(error)


def to_prompts(step: StepRows) -> Prompts:
    return Prompts(
        sample_ids=[row.sample_ids[0] for row in step.rows],
        ids=Ragged.from_rows([row.input_ids for row in step.rows], np.int32),
        messages=[row.messages or "[]" for row in step.rows],
        epoch=step.epoch,
    )

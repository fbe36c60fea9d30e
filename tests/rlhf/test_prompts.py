"""Prompts come in time, or the wait for them is told and ends."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from medgpt.config.base import ConfigError
from medgpt.data.loader.stream import Row, Step
from medgpt.rlhf.prompts import as_prompts, within
from medgpt.rlhf.rollout_batch import Prompts


def prompts(num: int) -> Iterator[Prompts]:
    ids = np.arange(3, dtype=np.int32)
    for number in range(num):
        rows = [
            Row(
                input_ids=ids,
                targets=ids > 0,
                word_ids=None,
                lengths=np.array([3]),
                sample_ids=[f"{number}"],
                chunks=[0],
                visits=[0],
                messages='[["user", "?"]]',
            )
        ]
        yield as_prompts(Step(epoch=0, step=number, rows=rows, num_rows=1))


def test_all_prompts_come_in_order_and_an_error_comes_as_it_is() -> None:
    def broken() -> Iterator[Prompts]:
        yield from prompts(2)
        raise OSError("no disk")

    said: list[str] = []
    found = within(broken(), "prompts", wait_s=5, say=said.append)
    assert [next(found).sample_ids for _ in range(2)] == [["0"], ["1"]]
    with pytest.raises(OSError, match="no disk"):
        next(found)
    assert len(list(within(prompts(4), "prompts", wait_s=5, say=said.append))) == 4
    assert not said


def test_the_wait_for_prompts_is_told_and_bounded() -> None:
    never = threading.Event()

    def stuck() -> Iterator[Prompts]:
        yield from prompts(1)
        never.wait(30)

    said: list[str] = []
    found = within(stuck(), "prompts", wait_s=0.4, say=said.append, said_after_s=0.1)
    next(found)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"cluster.wait_s=0.4: no prompts .* cluster.data_cpus"):
        next(found)
    assert time.monotonic() - began < 5
    assert said == ["prompts: waiting up to 0.4 s for the data tasks"]
    never.set()

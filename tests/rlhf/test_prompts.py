"""The prompt stream, and the timeout of the wait for it."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from medgpt.config.base import ConfigError
from medgpt.data.loader.stream import PackedRow, StepRows
from medgpt.rlhf.prompts import to_prompts, with_timeout
from medgpt.rlhf.rollout_batch import Prompts


def prompts(num: int) -> Iterator[Prompts]:
    ids = np.arange(3, dtype=np.int32)
    for number in range(num):
        rows = [
            PackedRow(
                input_ids=ids,
                targets=ids > 0,
                word_ids=None,
                lengths=np.array([3]),
                sample_ids=[f"{number}"],
                chunks=[0],
                repeat=[0],
                messages='[["user", "?"]]',
            )
        ]
        yield to_prompts(StepRows(epoch=0, step=number, rows=rows, num_rows=1))


def test_prompts_come_in_order_and_errors_pass_through() -> None:
    def broken() -> Iterator[Prompts]:
        yield from prompts(2)
        raise OSError("no disk")

    messages: list[str] = []
    stream = with_timeout(broken(), "prompts", wait_s=5, say=messages.append)
    assert [next(stream).sample_ids for _ in range(2)] == [["0"], ["1"]]
    with pytest.raises(OSError, match="no disk"):
        next(stream)
    assert len(list(with_timeout(prompts(4), "prompts", wait_s=5, say=messages.append))) == 4
    assert not messages


def test_the_wait_for_prompts_is_logged_and_times_out() -> None:
    never = threading.Event()

    def stuck() -> Iterator[Prompts]:
        yield from prompts(1)
        never.wait(30)

    messages: list[str] = []
    stream = with_timeout(stuck(), "prompts", wait_s=0.4, say=messages.append, log_after_s=0.1)
    next(stream)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"cluster.wait_s=0.4: no prompts .* cluster.data_cpus"):
        next(stream)
    assert time.monotonic() - began < 5
    assert messages == ["prompts: waiting up to 0.4 s for the data tasks"]
    never.set()

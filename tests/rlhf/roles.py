"""A role that needs no model."""

import os
import signal
import time

import torch
import torch.distributed as dist

from medgpt.config import ConfigError


class Adder:
    """Adds up over the ranks of its pool."""

    def __init__(self, offset: int = 0) -> None:
        self.offset, self.calls = offset, 0

    def total(self, number: int) -> int:
        """Sum over ranks of `number` + rank."""
        self.calls += 1
        tensor = torch.tensor(number + self.offset + dist.get_rank())
        dist.all_reduce(tensor)
        return int(tensor)

    def own(self, number: int) -> tuple[int, int, int]:
        self.calls += 1
        return number + self.offset, self.calls, os.getpid()

    def facts(self) -> dict[str, int]:
        return {
            "rank": dist.get_rank(),
            "ranks": dist.get_world_size(),
            "pid": os.getpid(),
            "threads": torch.get_num_threads(),
        }

    def refuse(self) -> None:
        raise ConfigError("model.name=x: has no head; name another")

    def fail(self) -> None:
        raise KeyError("a bug")

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def die(self, rank: int, then_sum: bool) -> int:
        """`rank` is killed; the others meet in a collective, or sleep."""
        if dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        if then_sum:
            return self.total(0)
        time.sleep(600)
        return 0


def refuse() -> Adder:
    raise ConfigError("pools.reward.precision=bf16: this machine has none")

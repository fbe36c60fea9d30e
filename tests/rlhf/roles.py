"""A role that needs no model."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from torch import Tensor

from medgpt.config.base import ConfigError
from medgpt.rlhf.weight_sync import process_group
from medgpt.rlhf.weight_sync.buckets import Header, pack, unpack


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

    def hold(self, size: int) -> list[ray.ObjectRef]:
        """What is lost when this worker is."""
        return [ray.put(torch.zeros(size))]

    def size(self, data: Tensor) -> int:
        return len(data)

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


def die() -> Adder:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def die_once(marker: Path) -> Adder:
    """In one of the ranks, the first time."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return Adder()
    return die()


class Doomed:
    """Makes an Adder; a worker that reads it from its message while `marker` exists dies of it,
    before it has joined the others, and takes the marker with it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __call__(self) -> Adder:
        return Adder()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        try:
            self.marker.unlink()
        except FileNotFoundError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


SHAPES = {"embed": (700, 512), "norm": (5,), "half": (3, 7), "count": (), "wide": (3, 333)}


def spoiled(times: int) -> Callable[..., Any]:
    """`process_group.unpack`, of data that changed on their way so many times."""
    left = [times]

    def unpack_spoiled(header: Header, data: Tensor, *, where: str) -> Any:
        if left[0]:
            left[0] -= 1
            data[0] += 1
        return unpack(header, data, where=where)

    return unpack_spoiled


def garbled(times: int) -> Callable[..., Any]:
    """A `Header.from_tensor` whose bytes changed on their way so many times."""
    left = [times]

    class Garbled(Header):
        @classmethod
        def from_tensor(cls, tensor: Tensor) -> Header:
            if left[0]:
                left[0] -= 1
                tensor.zero_()
            return Header.from_tensor(tensor)

    return Garbled


def unreachable(*args: Any, **kwargs: Any) -> None:
    raise ConnectionError("no route")


def stopped(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def killed(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def pack_late(*args: Any) -> Iterator[Any]:
    """`buckets.pack`, when who was killed meanwhile is gone."""
    time.sleep(1)
    yield from pack(*args)


def failing(*args: Any, **kwargs: Any) -> None:
    raise KeyError("a name that it does not know")


class Holder:
    """Sends its weights or receives them: one larger than a bucket of 1 MiB, some odd ones."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.held = {
            name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()
        }
        self.held["half"] = self.held["half"].bfloat16()
        self.weight_version = -1
        self.missing = set(self.held)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self.held.items():
            dist.barrier()  # as ZeRO-3 gathers
            if dist.get_rank() == 0:
                yield name, weight

    def train(self) -> None:
        for weight in self.held.values():
            weight += 1

    def load_weights(self, weights: Sequence[tuple[str, Tensor]]) -> None:
        for name, weight in weights:
            self.held[name].copy_(weight)
            self.missing.discard(name)

    def tamper(self, rank: int, name: str, fault: Callable[..., Any]) -> None:
        """On one rank, a function that `process_group` calls is another one from now on."""
        if dist.get_rank() == rank:
            setattr(process_group, name, fault)

    def is_linked(self) -> bool:
        return process_group._link is not None

    def rest(self, seconds: float) -> None:
        time.sleep(seconds)

    def weights_loaded(self, version: int) -> None:
        assert not self.missing, self.missing
        self.missing = set(self.held)
        self.weight_version = version

    def sums(self) -> tuple[int, dict[str, float]]:
        return self.weight_version, {n: float(w.double().sum()) for n, w in self.held.items()}

    def pid(self) -> int:
        return os.getpid()


class Guest:
    """Knows when it had the device."""

    def __init__(self) -> None:
        self.resident = True

    def onload(self) -> None:
        self.resident = True

    def offload(self) -> None:
        self.resident = False

    def occupy(self, seconds: float) -> tuple[bool, float, float]:
        began = time.time()
        time.sleep(seconds)
        dist.barrier()
        return self.resident, began, time.time()

    def peek(self) -> bool:
        return self.resident

"""Roles without models, and faults to inject, for the tests of pools and weight sync."""

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
from medgpt.rlhf.weight_sync.buckets import Header, pack_buckets, unpack_bucket


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
        """Return a ref that is lost when this worker dies."""
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
        """Kill `rank`; the others enter a collective, or sleep."""
        if dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        if then_sum:
            return self.total(0)
        time.sleep(600)
        return 0


def raise_config_error() -> Adder:
    raise ConfigError("pools.reward.precision=bf16: this machine has none")


def kill_self() -> Adder:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def kill_first_caller(marker: Path) -> Adder:
    """Kill the first rank that calls this; the others return an Adder."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return Adder()
    return kill_self()


class DiesWhenUnpickled:
    """Builds an Adder. A worker that unpickles it while `marker` exists removes the marker and dies
    before it joins the group."""

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


def corrupting_unpack(times: int) -> Callable[..., Any]:
    """`process_group.unpack_bucket`, with data corrupted `times` times."""
    left = [times]

    def unpack_spoiled(header: Header, data: Tensor, *, route: str) -> Any:
        if left[0]:
            left[0] -= 1
            data[0] += 1
        return unpack_bucket(header, data, route=route)

    return unpack_spoiled


def corrupting_header(times: int) -> Callable[..., Any]:
    """`Header` whose `from_tensor` reads corrupted bytes `times` times."""
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


def stop_process(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def kill_process(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def pack_late(*args: Any) -> Iterator[Any]:
    """`buckets.pack_buckets`, after a delay in which a killed peer disappears."""
    time.sleep(1)
    yield from pack_buckets(*args)


def raise_key_error(*args: Any, **kwargs: Any) -> None:
    raise KeyError("a name that it does not know")


class WeightHolder:
    """Sender and receiver of weights: one larger than a bucket of 1 MiB, some of odd shapes."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tensors = {
            name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()
        }
        self.tensors["half"] = self.tensors["half"].bfloat16()
        self.weight_version, self.sync = -1, process_group.SyncState()
        self.missing = set(self.tensors)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self.tensors.items():
            dist.barrier()  # like the gathering of ZeRO-3
            if dist.get_rank() == 0:
                yield name, weight

    def train(self) -> None:
        for weight in self.tensors.values():
            weight += 1

    def load_weights(self, weights: Sequence[tuple[str, Tensor]]) -> None:
        for name, weight in weights:
            self.tensors[name].copy_(weight)
            self.missing.discard(name)

    def tamper(self, rank: int, name: str, fault: Callable[..., Any]) -> None:
        """On one rank, replace a name in `process_group` with a fault."""
        if dist.get_rank() == rank:
            setattr(process_group, name, fault)

    def is_connected(self) -> bool:
        return self.sync.group is not None

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def weights_loaded(self, version: int) -> None:
        assert not self.missing, self.missing
        self.missing = set(self.tensors)
        self.weight_version = version

    def sums(self) -> tuple[int, dict[str, float]]:
        return self.weight_version, {n: float(w.double().sum()) for n, w in self.tensors.items()}

    def pid(self) -> int:
        return os.getpid()


class DeviceGuest:
    """Records when it was on the device."""

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

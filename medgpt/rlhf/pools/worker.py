"""What runs in one process of a pool. Light until it is told to load: the driver imports it too."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import psutil
import ray

Address = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """Which worker of which pool a process is."""

    role: str
    rank: int
    world_size: int
    threads: int
    gpu: bool
    offload: bool
    timeout_s: float
    """Of a collective, and of the wait for the other ranks."""


class Usage(NamedTuple):
    """What a worker takes."""

    rss_gb: float
    call_s: float
    """Of its latest call."""


class Worker:
    """One rank of a pool: imports, joins the pool's process group, then holds one role."""

    def __init__(self, seat: WorkerSpec) -> None:
        self.seat = seat
        self.store: Any = None
        self.call_s = 0.0
        self.role: Any = None

    def load(self, make: Callable[[], Any]) -> None:
        """Unpickling `make` has imported the role's libraries, in all processes at once."""
        import torch

        torch.set_num_threads(self.seat.threads)
        self.make = make

    def offer(self) -> Address:
        """Rank 0 opens the store where the ranks of a new group meet."""
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        host = ray.util.get_node_ip_address()
        self.store = TCPStore(
            host, 0, is_master=True, wait_for_workers=False, timeout=self._timeout
        )
        return host, self.store.port

    def join(self, address: Address, epoch: int) -> None:
        """Become a rank of the group of this epoch, after leaving an earlier one."""
        import torch.distributed as dist
        from torch.distributed import (
            PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
            TCPStore,  # pyright: ignore[reportPrivateImportUsage]
        )

        seat = self.seat
        if dist.is_initialized():
            dist.destroy_process_group()
        if seat.rank > 0:
            self.store = TCPStore(*address, is_master=False, timeout=self._timeout)
        os.environ |= {
            "MASTER_ADDR": address[0],
            "MASTER_PORT": str(address[1]),
            "RANK": str(seat.rank),
            "WORLD_SIZE": str(seat.world_size),
            "LOCAL_RANK": "0",  # Ray shows a process its own devices only
        }
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if seat.gpu else "gloo",
            store=PrefixStore(f"{seat.role}/{epoch}", self.store),
            rank=seat.rank,
            world_size=seat.world_size,
            timeout=self._timeout,
        )

    def build(self) -> None:
        """Make the role, or make it anew."""
        self.role = None  # its memory is free before the new one needs it
        self.role = self.make()
        if self.seat.offload:
            self.role.offload()

    def call(
        self, method: Callable[..., Any], after: Sequence[Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run `method` on the role, on the device only then if it is told to offload.

        Args:
            after: refs of calls that must have ended, well or not, before this one.
        """
        if after:
            ray.wait(list(after), num_returns=len(after), fetch_local=False)
        began = time.monotonic()
        try:
            return self._run(method, args, kwargs)
        except Exception as error:
            seat = self.seat
            error.add_note(f"in {method.__name__} of the {seat.role} pool, rank {seat.rank}")
            raise
        finally:
            self.call_s = time.monotonic() - began

    def _run(self, method: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if not self.seat.offload:
            return method(self.role, *args, **kwargs)
        self.role.onload()
        try:
            return method(self.role, *args, **kwargs)
        finally:
            self.role.offload()

    def ping(self) -> int:
        """The process id, once earlier calls are done."""
        return os.getpid()

    def usage(self) -> Usage:
        """Of the latest call."""
        return Usage(psutil.Process().memory_info().rss / 2**30, self.call_s)

    @property
    def _timeout(self) -> timedelta:
        return timedelta(seconds=self.seat.timeout_s)

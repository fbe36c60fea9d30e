"""The Ray actor of a pool's worker. Imports torch only when called: the driver imports it too."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import psutil
import ray

StoreAddress = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """Identity and settings of one worker."""

    role: str
    rank: int
    world_size: int
    threads: int
    gpu: bool
    offload: bool
    timeout_s: float
    """Timeout of collectives and of joining the process group."""


class Usage(NamedTuple):
    """Memory and time used by a worker."""

    rss_gb: float
    call_s: float
    """Duration of the latest call."""


class Worker:
    """One rank of a pool: joins the pool's process group, then builds and calls its role."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.store: Any = None
        self.call_s = 0.0
        self.role: Any = None

    def load_builder(self, build_role: Callable[[], Any]) -> None:
        """Keep `build_role`; unpickling it imports the role's libraries in all workers at once."""
        import torch

        torch.set_num_threads(self.spec.threads)
        self.build_role = build_role

    def open_store(self) -> StoreAddress:
        """Open the TCP store of a new process group on rank 0; return host and port."""
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        host = ray.util.get_node_ip_address()
        self.store = TCPStore(
            host, 0, is_master=True, wait_for_workers=False, timeout=self._timeout
        )
        return host, self.store.port

    def join_group(self, address: StoreAddress, group_number: int) -> None:
        """Join the process group of this number after leaving an earlier one."""
        import torch.distributed as dist
        from torch.distributed import (
            PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
            TCPStore,  # pyright: ignore[reportPrivateImportUsage]
        )

        spec = self.spec
        if dist.is_initialized():
            dist.destroy_process_group()
        if spec.rank > 0:
            self.store = TCPStore(*address, is_master=False, timeout=self._timeout)
        os.environ |= {
            "MASTER_ADDR": address[0],
            "MASTER_PORT": str(address[1]),
            "RANK": str(spec.rank),
            "WORLD_SIZE": str(spec.world_size),
            "LOCAL_RANK": "0",  # Ray shows a process only its own devices
        }
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if spec.gpu else "gloo",
            store=PrefixStore(f"{spec.role}/{group_number}", self.store),
            rank=spec.rank,
            world_size=spec.world_size,
            timeout=self._timeout,
        )

    def rebuild_role(self) -> None:
        """Build the role, replacing an earlier one."""
        self.role = None  # free its memory before building the new one
        self.role = self.build_role()
        if self.spec.offload:
            self.role.offload()

    def call(
        self, method: Callable[..., Any], earlier: Sequence[Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run `method` on the role; with offload, the role is on the device only meanwhile.

        Args:
            earlier: refs of calls that must end before this one, successfully or not.
        """
        if earlier:
            ray.wait(list(earlier), num_returns=len(earlier), fetch_local=False)
        began = time.monotonic()
        try:
            return self._run(method, args, kwargs)
        except Exception as error:
            spec = self.spec
            error.add_note(f"in {method.__name__} of the {spec.role} pool, rank {spec.rank}")
            raise
        finally:
            self.call_s = time.monotonic() - began

    def _run(self, method: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if not self.spec.offload:
            return method(self.role, *args, **kwargs)
        self.role.onload()
        try:
            return method(self.role, *args, **kwargs)
        finally:
            self.role.offload()

    def ping(self) -> int:
        """Return the process id after all earlier calls."""
        return os.getpid()

    def usage(self) -> Usage:
        """Return memory and time of the latest call."""
        return Usage(psutil.Process().memory_info().rss / 2**30, self.call_s)

    @property
    def _timeout(self) -> timedelta:
        return timedelta(seconds=self.spec.timeout_s)

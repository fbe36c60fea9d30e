"""The Ray actor of a pool's worker. Imports torch only when called: the driver imports it too."""

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import islice
from typing import Any, NamedTuple

import psutil
import ray

from medgpt.config.pools import RoleConfig

StoreAddress = tuple[str, int]


class Usage(NamedTuple):
    """Memory and time used by a worker."""

    rss_gb: float
    call_s: float
    """Duration of the latest call."""


def open_tcp_store(timeout_s: float) -> tuple[Any, StoreAddress]:
    """Open a TCP store on a free port of this node; return it and its address."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    host, timeout = ray.util.get_node_ip_address(), timedelta(seconds=timeout_s)
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
    return store, (host, store.port)


class Worker:
    """One rank of a pool: joins the pool's process group, then builds and calls its role.

    Args:
        timeout_s: of collectives and of joining the process group.
    """

    def __init__(self, name: str, rank: int, config: RoleConfig, timeout_s: float) -> None:
        self.name, self.rank, self.config, self.timeout_s = name, rank, config, timeout_s
        self.store: Any = None
        self.call_s = 0.0
        self.role: Any = None

    def load_builder(self, build_role: Callable[[], Any]) -> None:
        """Keep `build_role`. All workers unpickle it, and import torch, at the same time."""
        import torch

        torch.set_num_threads(max(1, int(self.config.cpus_per_worker)))
        self.build_role = build_role

    def open_store(self) -> StoreAddress:
        """Open the TCP store of a new process group on rank 0; return host and port."""
        self.store, address = open_tcp_store(self.timeout_s)
        return address

    def join_group(self, address: StoreAddress, group_number: int) -> None:
        """Join the process group of this number after leaving an earlier one."""
        import torch.distributed as dist
        from torch.distributed import (
            PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
            TCPStore,  # pyright: ignore[reportPrivateImportUsage]
        )

        timeout, world_size = timedelta(seconds=self.timeout_s), self.config.num_workers
        if dist.is_initialized():
            dist.destroy_process_group()
        if self.rank > 0:
            self.store = TCPStore(*address, is_master=False, timeout=timeout)
        os.environ |= {
            "MASTER_ADDR": address[0],
            "MASTER_PORT": str(address[1]),
            "RANK": str(self.rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": "0",  # Ray shows a process only its own devices
        }
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self.config.gpus_per_worker > 0 else "gloo",
            store=PrefixStore(f"{self.name}/{group_number}", self.store),
            rank=self.rank,
            world_size=world_size,
            timeout=timeout,
        )

    def rebuild_role(self) -> None:
        """Build the role, replacing an earlier one."""
        self.role = None  # free its memory before building the new one
        self.role = self.build_role()
        if self.config.offload:
            self.role.offload()

    def call(
        self,
        method: Callable[..., Any],
        earlier: Sequence[Any],
        lengths: Sequence[int | None],
        *flat: Any,
        **kwargs: Any,
    ) -> Any:
        """Run `method` on the role; with offload, the role is on the device only meanwhile.

        Args:
            earlier: refs of calls that must end before this one, successfully or not.
            lengths: of the arguments that are lists, None for others.
            flat: the arguments, lists flattened: Ray resolves refs at the top level only.
        """
        if earlier:
            ray.wait(list(earlier), num_returns=len(earlier), fetch_local=False)
        items = iter(flat)
        args = [next(items) if n is None else list(islice(items, n)) for n in lengths]
        began = time.monotonic()
        try:
            if not self.config.offload:
                return method(self.role, *args, **kwargs)
            self.role.onload()
            try:
                return method(self.role, *args, **kwargs)
            finally:
                self.role.offload()
        except Exception as error:
            error.add_note(f"in {method.__name__} of the {self.name} pool, rank {self.rank}")
            raise
        finally:
            self.call_s = time.monotonic() - began

    def usage(self) -> Usage:
        """Return memory and time of the latest call, after all earlier calls."""
        return Usage(psutil.Process().memory_info().rss / 2**30, self.call_s)

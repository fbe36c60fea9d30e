"""Two gloo ranks in separate processes."""

import datetime
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TwoRanks = Callable[..., list[Any]]
TIMEOUT_S = 60


def join(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=timeout
    )


@contextmanager
def start_ranks(store: Path) -> Iterator[TwoRanks]:
    """Yield a function that runs a module-level function on both ranks; it returns the results."""
    spawn = mp.get_context("spawn")
    pools = [
        ProcessPoolExecutor(1, mp_context=spawn, initializer=join, initargs=(rank, str(store)))
        for rank in range(2)
    ]

    def run(function: Callable[..., Any], *args: Any) -> list[Any]:
        futures = [pool.submit(function, *args) for pool in pools]
        done, _ = wait(futures, timeout=2 * TIMEOUT_S, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()  # raises the first failure, not the peer's timeout
        return [future.result(timeout=0) for future in futures]

    yield run
    for pool in pools:
        pool.shutdown()

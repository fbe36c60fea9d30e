"""The workers' side of weight sync: a process group of actor rank 0 and all rollout workers.

It exists besides the default groups of the pools. The public functions run in workers, through
`Pool.call`.
"""

import itertools
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import ray
import torch
import torch.distributed as dist
from ray.exceptions import GetTimeoutError, ObjectLostError
from torch import Tensor
from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)

from medgpt.config.pools import SyncConfig
from medgpt.rlhf.pools.worker import StoreAddress, open_tcp_store
from medgpt.rlhf.rollout_batch import NO_VERSION
from medgpt.rlhf.weight_sync.buckets import (
    END_HEADER,
    HEADER_BYTES,
    Header,
    SyncError,
    WeightsCorrupted,
    WeightsRejected,
    pack_buckets,
    unpack_bucket,
)

StoredBuckets = list[tuple[Header, Any]]  # object refs of the bytes
NUM_BUFFERS = 3  # one is packed or loaded while two are in flight


class Sender(Protocol):
    """Interface of the actor role."""

    sync: "SyncState"

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield Hugging Face names and full weights on rank 0, nothing elsewhere. Collective."""
        ...


class Receiver(Protocol):
    """Interface of the rollout role."""

    sync: "SyncState"
    weight_version: int

    def load_weights(self, weights: Sequence[tuple[str, Tensor]]) -> None:
        """Copy some weights into the model; the tensors are valid only during the call."""
        ...

    def weights_loaded(self, version: int) -> None:
        """Called after the last weights. Raises ValueError if some are missing."""
        ...


class SyncGroup:
    """One member of the sync group: rank 0 (the actor) sends, the others receive."""

    def __init__(
        self, store: Any, key: str, rank: int, size: int, backend: str, config: SyncConfig
    ) -> None:
        self.rank, self.size, self.store = rank, size, store
        self.name = "actor rank 0" if rank == 0 else f"rollout rank {rank - 1}"
        self.peer_names = f"rollout ranks 0 to {size - 2}" if rank == 0 else "actor rank 0"
        self.timeout_s = config.timeout_s
        self.device = torch.device("cuda" if backend == "nccl" else "cpu")
        timeout = timedelta(seconds=config.timeout_s)
        prefixed = PrefixStore(f"sync/{key}", store)
        if backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self.group: Any = dist.ProcessGroupNCCL(prefixed, rank, size, options)
        else:
            self.group = dist.ProcessGroupGloo(prefixed, rank, size, timeout)
        self.buffers = [self._empty_bytes(config.bucket_mb * 2**20) for _ in range(NUM_BUFFERS)]

    def send(self, weights: Iterator[tuple[str, Tensor]], version: int) -> int:
        """Broadcast all weights, packing buckets while others are in flight. Return the bytes."""
        total = 0
        under_way: deque[list[Any]] = deque()
        for header, data in pack_buckets(weights, itertools.cycle(self.buffers)):
            under_way.append(
                [self._broadcast(header.to_tensor().to(self.device)), self._broadcast(data)]
            )
            total += len(data)
            # the next bucket reuses the oldest buffer; an oversized weight is sent in place
            max_under_way = 0 if len(data) > len(self.buffers[0]) else len(self.buffers) - 1
            while len(under_way) > max_under_way:
                self._wait(under_way.popleft(), version)
        under_way.append([self._broadcast(END_HEADER.to_tensor().to(self.device))])
        for works in under_way:
            self._wait(works, version)
        return total

    def receive(self, role: Receiver, version: int) -> int:
        """Load all weights that rank 0 sends, loading a bucket while the next is in flight.

        An error while loading is raised after the last bucket: the other members would wait for a
        member that left earlier.
        """
        total, route = 0, f"version {version}, {self.peer_names} to {self.name}"
        role.weight_version = NO_VERSION  # a mixture until all weights are loaded
        header_buffer = self._empty_bytes(HEADER_BYTES)
        next_header = self._broadcast(header_buffer)
        loaded: tuple[Header, Tensor] | None = None
        failure: SyncError | None = None
        for slot in itertools.cycle(range(len(self.buffers))):
            self._wait([next_header], version)
            header = _parse_header(header_buffer, route)
            data = self._buffer(slot, header.num_bytes)
            works = [self._broadcast(data)] if header.entries else []
            if header.entries:
                next_header = self._broadcast(header_buffer)
            if loaded is not None and failure is None:
                try:
                    _load_bucket(role, *loaded, route)
                except SyncError as error:
                    failure = error
            self._wait(works, version)
            loaded = (header, data)
            total += len(data)
            if not header.entries:
                break
        if failure is not None:
            raise failure
        with _loading(route):
            role.weights_loaded(version)
        return total

    def _buffer(self, slot: int, size: int) -> Tensor:
        """Return a buffer of `size` bytes; a buffer that is too small is replaced for good."""
        if size > len(self.buffers[slot]):
            self.buffers[slot] = self._empty_bytes(size)
        return self.buffers[slot][:size]

    def _broadcast(self, tensor: Tensor) -> Any:
        return self.group.broadcast(tensor, 0)

    def _wait(self, works: Sequence[Any], version: int) -> None:
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise SyncError(
                f"version {version}: {self.name} lost {self.peer_names}, or waited "
                f"{self.timeout_s:g} s for it: {str(error).splitlines()[0]}"
            ) from None

    def _empty_bytes(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.uint8, device=self.device)


@dataclass
class SyncState:
    """What a role keeps between calls of the functions below."""

    store: Any = None
    """TCP store of the next group, on actor rank 0."""
    group: SyncGroup | None = None


def open_store(role: Sender, timeout_s: float) -> StoreAddress | None:
    """Open the TCP store of the sync group on actor rank 0; return host and port."""
    if dist.get_rank() > 0:
        return None
    role.sync.store, address = open_tcp_store(timeout_s)
    return address


def join_group(
    role: Sender | Receiver, address: StoreAddress, key: str, size: int, backend: str,
    config: SyncConfig, *, sends: bool,
) -> None:  # fmt: skip
    """Join the sync group of this key, to send or to receive. Collective over its members; actor
    ranks above 0 do nothing."""
    role.sync.group = None
    if not sends:
        timeout = timedelta(seconds=config.timeout_s)
        store = TCPStore(*address, is_master=False, timeout=timeout)
        role.sync.group = SyncGroup(store, key, dist.get_rank() + 1, size, backend, config)
    elif dist.get_rank() == 0:
        role.sync.group = SyncGroup(role.sync.store, key, 0, size, backend, config)


def send(role: Sender, version: int) -> int:
    """Send the weights; return the bytes that rank 0 sent. Collective over the actor pool."""
    if dist.get_rank() > 0:
        return sum(0 for _ in role.weights())
    assert role.sync.group is not None
    weights = role.weights()
    try:
        return role.sync.group.send(weights, version)
    except Exception as error:
        _leave_group(role, error)
        raise
    finally:  # after an error the other ranks still gather
        for _ in weights:
            pass


def receive(role: Receiver, version: int) -> int:
    """Load the weights that the actor sends; return the bytes."""
    assert role.sync.group is not None
    try:
        return role.sync.group.receive(role, version)
    except Exception as error:
        _leave_group(role, error)
        raise


def _leave_group(role: Sender | Receiver, error: BaseException | None) -> None:
    """Leave the group, so that the others do not wait until their timeout. Gloo has no call for it:
    its connections close when nothing refers to the group any more."""
    role.sync.group = None
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def put_buckets(role: Sender, version: int, bucket_mb: int) -> StoredBuckets:
    """Put all buckets into Ray's object store. Collective over the actor pool."""
    buffers = (torch.empty(bucket_mb * 2**20, dtype=torch.uint8) for _ in itertools.count())
    buckets = pack_buckets(((name, weight.cpu()) for name, weight in role.weights()), buffers)
    return [(header, ray.put(data.numpy())) for header, data in buckets]


def load_buckets(role: Receiver, stored: StoredBuckets, version: int, timeout_s: float) -> int:
    """Load all buckets from the object store; return the bytes."""
    route = f"version {version}, actor rank 0 by object store to rollout rank {dist.get_rank()}"
    role.weight_version = NO_VERSION
    for header, ref in stored:
        try:
            data = torch.from_numpy(ray.get(ref, timeout=timeout_s).copy())
        except (GetTimeoutError, ObjectLostError) as error:
            raise SyncError(
                f"{route}: {header.names} did not arrive within {timeout_s:g} s "
                f"({type(error).__name__})"
            ) from None
        _load_bucket(role, header, data, route)
    with _loading(route):
        role.weights_loaded(version)
    return sum(header.num_bytes for header, _ in stored)


def _parse_header(data: Tensor, route: str) -> Header:
    """Raises WeightsCorrupted if the header cannot be read."""
    try:
        return Header.from_tensor(data.cpu())
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsCorrupted(
            f"{route}: a header arrived corrupted ({type(error).__name__})"
        ) from None


def _load_bucket(role: Receiver, header: Header, data: Tensor, route: str) -> None:
    with _loading(f"{route}: {header.names}"):
        role.load_weights(unpack_bucket(header, data, route=route))


@contextmanager
def _loading(what: str) -> Iterator[None]:
    """Raise any error of a rollout engine as WeightsRejected."""
    try:
        yield
    except SyncError:
        raise
    except Exception as error:
        message = f"{what}: loading failed with {type(error).__name__}: {error}"
        raise WeightsRejected(message) from error

"""Packing of weights into buckets with headers and checksums."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import torch
import xxhash
from torch import Tensor

HEADER_BYTES = 1 << 15
ALIGNMENT = 16  # bytes; enough for every dtype


class SyncError(RuntimeError):
    """The weights did not arrive."""


class WeightsRejected(SyncError):
    """The weights arrived but could not be loaded."""


class WeightsCorrupted(SyncError):
    """The weights changed on the way."""


@dataclass(frozen=True)
class Entry:
    """One weight in a bucket."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes

    @property
    def size(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * torch.empty(0, dtype=self.torch_dtype).element_size()

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class Header:
    """Header of a bucket; one without entries ends the transfer."""

    entries: list[Entry]
    num_bytes: int
    checksum: int

    @property
    def names(self) -> str:
        return f"{self.entries[0].name} to {self.entries[-1].name}"

    def to_tensor(self) -> Tensor:  # (HEADER_BYTES,) uint8
        text = json.dumps(asdict(self)).encode()
        assert len(text) <= HEADER_BYTES, len(text)
        return torch.frombuffer(bytearray(text.ljust(HEADER_BYTES)), dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> "Header":
        fields = json.loads(tensor.numpy().tobytes())
        entries = [
            Entry(**{**entry, "shape": tuple(entry["shape"])}) for entry in fields["entries"]
        ]
        return cls(entries, fields["num_bytes"], fields["checksum"])


END_HEADER = Header([], 0, 0)


def pack_buckets(
    weights: Iterable[tuple[str, Tensor]], buffers: Iterator[Tensor]
) -> Iterator[tuple[Header, Tensor]]:
    """Yield buckets of `weights`: header and bytes, the used part of the next of `buffers` (uint8).

    A weight larger than a buffer gets a bucket of its own and is not copied if it is on the same
    device: its bytes are valid until the next bucket is requested.
    """
    entries: list[Entry] = []
    end, header_bytes = 0, 0
    buffer = next(buffers)
    for name, weight in weights:
        size = weight.numel() * weight.element_size()
        header_bytes += len(name) + 80  # upper bound of its entry as JSON
        if entries and (end + size > len(buffer) or header_bytes > HEADER_BYTES):
            yield _make_bucket(entries, buffer[:end])
            entries, end, header_bytes, buffer = [], 0, len(name) + 80, next(buffers)
        entry = Entry(name, str(weight.dtype).removeprefix("torch."), tuple(weight.shape), end)
        if size > len(buffer):
            tensor = weight.detach().to(buffer.device).contiguous()
            yield _make_bucket([entry], tensor.flatten().view(torch.uint8))
            continue
        entries.append(entry)
        _view(buffer, entry).copy_(weight)
        end = min(end + -(-size // ALIGNMENT) * ALIGNMENT, len(buffer))
    if entries:
        yield _make_bucket(entries, buffer[:end])


def unpack_bucket(header: Header, data: Tensor, *, route: str) -> list[tuple[str, Tensor]]:
    """Return names and views of the weights in a bucket.

    Raises:
        WeightsCorrupted: the checksum differs.
    """
    actual = checksum(data)
    if actual != header.checksum:
        raise WeightsCorrupted(
            f"{route}: {header.names} arrived corrupted, {actual:x} for {header.checksum:x}"
        )
    return [(entry.name, _view(data, entry)) for entry in header.entries]


def checksum(data: Tensor) -> int:
    """Return the checksum of a uint8 tensor; on a GPU a sum, which needs no copy to the host."""
    if data.device.type == "cpu":
        return xxhash.xxh3_64_intdigest(data.numpy().data)
    multiple_of_8 = len(data) // 8 * 8
    return int(data[:multiple_of_8].view(torch.int64).sum() + data[multiple_of_8:].sum()) % 2**64


def _make_bucket(entries: list[Entry], data: Tensor) -> tuple[Header, Tensor]:
    return Header(entries, len(data), checksum(data)), data


def _view(buffer: Tensor, entry: Entry) -> Tensor:
    span = buffer[entry.start : entry.start + entry.size]
    return span.view(entry.torch_dtype).view(entry.shape)

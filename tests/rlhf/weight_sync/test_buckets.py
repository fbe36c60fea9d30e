"""Buckets hold any weights; corrupted buckets are refused."""

from itertools import cycle

import pytest
import torch

from medgpt.rlhf.weight_sync.buckets import (
    HEADER_BYTES,
    Header,
    SyncError,
    pack_buckets,
    unpack_bucket,
)

WEIGHTS = {
    "a": torch.arange(7, dtype=torch.float32),
    "b": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "large": torch.arange(300, dtype=torch.int64),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
}


@pytest.mark.parametrize("size", [16, 33, 64, 4096])
def test_unpacking_returns_the_packed_weights(size: int) -> None:
    buffers = cycle([torch.empty(size, dtype=torch.uint8) for _ in range(2)])
    unpacked = {}
    for header, data in pack_buckets(WEIGHTS.items(), buffers):
        received = Header.from_tensor(header.to_tensor())
        assert received == header
        unpacked |= {
            name: weight.clone() for name, weight in unpack_bucket(received, data, route="here")
        }
    assert list(unpacked) == list(WEIGHTS)
    for name, weight in WEIGHTS.items():
        assert unpacked[name].dtype == weight.dtype
        assert torch.equal(unpacked[name], weight)


def test_many_small_weights_fit_their_headers() -> None:
    many = {f"model.layers.{i}.{'name' * 20}": torch.tensor(float(i)) for i in range(2000)}
    buckets = list(pack_buckets(many.items(), cycle([torch.empty(1 << 20, dtype=torch.uint8)])))
    assert len(buckets) > 1
    assert all(len(header.to_tensor()) == HEADER_BYTES for header, _ in buckets)


@pytest.mark.parametrize("position", [0, 27, -1])
def test_a_changed_byte_raises_weights_corrupted(position: int) -> None:
    ((header, data),) = pack_buckets(WEIGHTS.items(), cycle([torch.empty(4096, dtype=torch.uint8)]))
    data[position] += 1
    with pytest.raises(SyncError, match="version 3, actor rank 0 to rollout rank 1: a to empty"):
        unpack_bucket(header, data, route="version 3, actor rank 0 to rollout rank 1")

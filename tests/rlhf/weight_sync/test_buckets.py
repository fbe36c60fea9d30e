"""Buckets hold any weights, and what changed on the way is refused."""

from itertools import cycle

import pytest
import torch

from medgpt.rlhf.weight_sync.buckets import HEADER_BYTES, Header, SyncError, pack, unpack

WEIGHTS = {
    "a": torch.arange(7, dtype=torch.float32),
    "b": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "large": torch.arange(300, dtype=torch.int64),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
}


@pytest.mark.parametrize("size", [16, 33, 64, 4096])
def test_what_is_packed_is_what_is_unpacked(size: int) -> None:
    buffers = cycle([torch.empty(size, dtype=torch.uint8) for _ in range(2)])
    found = {}
    for header, data in pack(WEIGHTS.items(), buffers):
        again = Header.from_tensor(header.to_tensor())
        assert again == header
        found |= {name: weight.clone() for name, weight in unpack(again, data, where="here")}
    assert list(found) == list(WEIGHTS)
    for name, weight in WEIGHTS.items():
        assert found[name].dtype == weight.dtype
        assert torch.equal(found[name], weight)


def test_many_small_weights_fit_their_headers() -> None:
    many = {f"model.layers.{i}.{'name' * 20}": torch.tensor(float(i)) for i in range(2000)}
    buckets = list(pack(many.items(), cycle([torch.empty(1 << 20, dtype=torch.uint8)])))
    assert len(buckets) > 1
    assert all(len(header.to_tensor()) == HEADER_BYTES for header, _ in buckets)


@pytest.mark.parametrize("position", [0, 27, -1])
def test_one_changed_byte_is_refused(position: int) -> None:
    ((header, data),) = pack(WEIGHTS.items(), cycle([torch.empty(4096, dtype=torch.uint8)]))
    data[position] += 1
    with pytest.raises(SyncError, match="version 3, actor rank 0 to rollout rank 1: a to empty"):
        unpack(header, data, where="version 3, actor rank 0 to rollout rank 1")

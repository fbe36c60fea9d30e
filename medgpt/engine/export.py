"""Gather weights from an engine one at a time and write Hugging Face safetensors files."""

import json
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from medgpt.engine import state

if TYPE_CHECKING:
    from medgpt.models.lora import MergedWeight

MAX_SHARD_BYTES = 5 * 2**30


def gather_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and CPU tensor of each parameter and persistent buffer, tied ones once.

    Collective: every rank must exhaust the iterator, which yields on rank 0 only. The weights are
    those of the forward pass, in bf16 runs the rounded master weights.
    """
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        params = [tensor] if state.is_zero_param(tensor) else []
        with deepspeed.zero.GatheredParameters(params, enabled=bool(params)):
            copy = tensor.detach().to("cpu", copy=True) if dist.get_rank() == 0 else None
        if copy is not None:
            yield name, copy.contiguous()


def export_weights(module: nn.Module, directory: Path) -> None:
    """Write the weights of `module` as safetensors shards, tied ones once. Collective."""
    weights = gather_weights(module)
    try:
        save_safetensors(weights, directory)
    finally:  # after an error on rank 0 the other ranks still gather
        deque(weights, maxlen=0)


def gather_merged_weights(weights: "Iterable[MergedWeight]") -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of each merged weight, on the device of the model.

    Collective like `gather_weights`. A tensor may be the weight itself and is valid only until the
    next one is requested.
    """
    rank = dist.get_rank()
    for merged in weights:
        params = [source for source in merged.sources if state.is_zero_param(source)]
        with deepspeed.zero.GatheredParameters(params, enabled=bool(params)):
            if rank == 0:
                with torch.no_grad():
                    weight = merged.compute()
                yield merged.name, weight


def save_safetensors(
    items: Iterable[tuple[str, Tensor]], directory: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write `items` as model.safetensors, or as numbered shards with an index; nothing if empty.

    Holds one shard in memory. A tensor larger than `max_shard_bytes` gets a shard of its own.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = []  # names
    shard: dict[str, Tensor] = {}
    total = 0
    for name, tensor in items:
        size = tensor.numel() * tensor.element_size()
        if shard and _num_bytes(shard) + size > max_shard_bytes:
            shards.append(_write_shard(shard, directory, len(shards)))
            shard = {}
        shard[name] = tensor
        total += size
    if shard:
        shards.append(_write_shard(shard, directory, len(shards)))
    _finish_shards(shards, total, directory)


def _num_bytes(shard: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in shard.values())


def _write_shard(shard: dict[str, Tensor], directory: Path, index: int) -> list[str]:
    save_file(shard, directory / f"shard-{index}.tmp", metadata={"format": "pt"})
    return list(shard)


def _finish_shards(shards: list[list[str]], total: int, directory: Path) -> None:
    """Rename the shards, as their final names contain the number of shards, and write the index."""
    if len(shards) == 1:
        (directory / "shard-0.tmp").replace(directory / "model.safetensors")
        return
    weight_map = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{index}.tmp").replace(directory / file)
        weight_map |= dict.fromkeys(names, file)
    if shards:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True)
        (directory / "model.safetensors.index.json").write_text(text, "utf-8")

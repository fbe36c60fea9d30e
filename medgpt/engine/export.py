"""Gather weights from an engine one at a time and write Hugging Face safetensors files."""

import json
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import deepspeed
import torch
import torch.distributed as dist
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE
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
    for name, tensor in _distinct_weights(module):
        params = [tensor] if state.is_zero_param(tensor) else []
        with deepspeed.zero.GatheredParameters(params, enabled=bool(params)):
            copy = tensor.detach().to("cpu", copy=True) if dist.get_rank() == 0 else None
        if copy is not None:
            yield name, copy.contiguous()


def _distinct_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and persistent buffers, tied ones once, under their first name."""
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def export_weights(
    module: nn.Module, directory: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write the weights of `module`, tied ones once, as safetensors. Collective.

    Writes model.safetensors, or numbered shards with an index. Holds one shard in memory, and a
    tensor larger than `max_shard_bytes`, which gets a shard of its own.
    """
    weights = gather_weights(module)
    try:
        if dist.get_rank() == 0:
            _save_shards(weights, _plan_shards(module, max_shard_bytes), directory)
    finally:  # the other ranks, and rank 0 after an error, still gather
        deque(weights, maxlen=0)


def _plan_shards(module: nn.Module, max_shard_bytes: int) -> StateDictSplit:
    sizes = {
        name: torch.empty(state.full_shape(tensor), dtype=tensor.dtype, device="meta")
        for name, tensor in _distinct_weights(module)
    }
    return split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_bytes)


def _save_shards(
    weights: Iterable[tuple[str, Tensor]], plan: StateDictSplit, directory: Path
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    shards: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in weights:
        file = plan.tensor_to_filename[name]
        shards[file][name] = tensor
        if len(shards[file]) == len(plan.filename_to_tensors[file]):
            save_file(shards.pop(file), directory / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True)
        (directory / SAFETENSORS_INDEX_FILE).write_text(text, "utf-8")


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

"""Gather weights from an engine one at a time and write Hugging Face safetensors files."""

import json
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE
from safetensors.torch import save_file
from torch import Tensor, nn

from medgpt.engine import state
from medgpt.models.weight_layout import ModuleWeight, groups_in_module

MAX_SHARD_BYTES = 5 * 2**30


def gather_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and CPU tensor of each parameter and persistent buffer, tied ones once.

    Collective: every rank must exhaust the iterator, which yields on rank 0 only. The weights are
    those of the forward pass, in bf16 runs the rounded master weights.
    """
    for name, tensor in _distinct_weights(module):
        with _gathered([tensor]) as is_here:
            copy = tensor.detach().to("cpu", copy=True) if is_here else None
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

    Names and shapes are those of the hub's files. Writes model.safetensors, or numbered shards with
    an index. Holds one shard in memory, and a tensor larger than `max_shard_bytes`, which gets a
    shard of its own.
    """
    weights = [
        ModuleWeight(name, [tensor], tensor.detach) for name, tensor in _distinct_weights(module)
    ]
    gathered = gather_in_file_layout(module, weights)
    try:
        if dist.get_rank() == 0:
            copies = ((name, tensor.to("cpu", copy=True)) for name, tensor in gathered)
            _save_shards(copies, _plan_shards(module, max_shard_bytes), directory)
    finally:  # the other ranks, and rank 0 after an error, still gather
        deque(gathered, maxlen=0)


def _plan_shards(module: nn.Module, max_shard_bytes: int) -> StateDictSplit:
    sizes = {
        name: torch.empty(state.full_shape(tensor), dtype=tensor.dtype, device="meta")
        for name, tensor in _distinct_weights(module)
    }
    in_files: dict[str, Tensor] = {}
    for group in groups_in_module(module, sizes):
        in_files |= group.convert([sizes[name] for name in group.sources], module)
    return split_torch_state_dict_into_shards(in_files, max_shard_size=max_shard_bytes)


def _save_shards(
    weights: Iterable[tuple[str, Tensor]], plan: StateDictSplit, directory: Path
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    shards: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in weights:
        file = plan.tensor_to_filename[name]
        shards[file][name] = tensor.contiguous()
        if len(shards[file]) == len(plan.filename_to_tensors[file]):
            save_file(shards.pop(file), directory / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True)
        (directory / SAFETENSORS_INDEX_FILE).write_text(text, "utf-8")


def gather_merged_weights(weights: Iterable[ModuleWeight]) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of each weight, on the device of the model.

    Collective like `gather_weights`. A tensor may be the weight itself and is valid only until the
    next one is requested.
    """
    for weight in weights:
        with _gathered(weight.sources) as is_here:
            if is_here:
                yield weight.name, weight.compute()


def gather_in_file_layout(
    module: nn.Module, weights: Iterable[ModuleWeight]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the same weights under the names and in the shapes of the hub's files.

    Args:
        module: the Hugging Face model that has the weights.
    """
    by_name = {weight.name: weight for weight in weights}
    for group in groups_in_module(module, by_name):
        members = [by_name[name] for name in group.sources]
        with _gathered([source for member in members for source in member.sources]) as is_here:
            if is_here:
                yield from group.convert([member.compute() for member in members], module).items()


@contextmanager
def _gathered(sources: Iterable[Tensor]) -> Iterator[bool]:
    """Gather the parameters for reading; yield whether this rank is the one that reads."""
    params = [source for source in sources if state.is_zero_param(source)]
    with deepspeed.zero.GatheredParameters(params, enabled=bool(params)), torch.no_grad():
        yield dist.get_rank() == 0

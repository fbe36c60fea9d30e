"""Checkpoints in safetensors that any number of ranks, ZeRO stage or offload can continue from.

A parameter is stored whole, in fp32: `weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`, all in the
file of the rank that owns it. Only trainable parameters are stored; frozen ones come from the base.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter

from medgpt.engine import state

STEPS_FILE = "engine.json"


def save(
    directory: Path,
    params: Mapping[str, Parameter],
    adam: torch.optim.AdamW,
    optimizer: state.DeepSpeedOptimizer,
    *,
    steps: int,
) -> None:
    """Write this rank's file into `directory`, rank 0 the step counts too. Collective."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    sizes = {name: state.full_shape(param).numel() for name, param in params.items()}
    owners = assign_owners(sizes, num_ranks)
    mine: dict[str, Tensor] = {}
    for name, param in params.items():
        for kind in state.KINDS:
            full = state.gather(optimizer, param, kind)
            if owners[name] == rank:
                mine[f"{kind}/{name}"] = full.to("cpu", torch.float32).contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    save_file(mine, directory / f"rank-{rank:05d}-of-{num_ranks:05d}.safetensors")
    if rank == 0:
        counts = {"steps": steps, "adam_steps": state.adam_step(adam, optimizer)}
        (directory / STEPS_FILE).write_text(json.dumps(counts), "utf-8")
    dist.barrier()  # all files are there when it returns


def load(
    directory: Path,
    params: Mapping[str, Parameter],
    adam: torch.optim.AdamW,
    optimizer: state.DeepSpeedOptimizer,
) -> int:
    """Restore weights, moments and Adam's step count. Returns the number of steps. Collective.

    Raises:
        ValueError: the checkpoint is of a model with other trainable parameters.
    """
    counts = json.loads((directory / STEPS_FILE).read_text("utf-8"))
    found: set[str] = set()
    for file in sorted(directory.glob("rank-*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                kind, name = key.split("/", 1)
                assert kind in state.KINDS
                found.add(key)
                if name in params:
                    state.scatter(optimizer, params[name], kind, tensors.get_tensor(key))
    expected = {f"{kind}/{name}" for kind in state.KINDS for name in params}
    if found != expected:
        some = ", ".join(sorted(found ^ expected)[:3])
        raise ValueError(f"{directory} is a checkpoint of another model: it differs in {some}")
    state.set_adam_step(adam, optimizer, counts["adam_steps"])
    state.refresh_weights(optimizer)
    return counts["steps"]


def checkpoint_files(rank: int, num_ranks: int) -> list[str]:
    """Names of the files that `save` writes on this rank."""
    return [f"rank-{rank:05d}-of-{num_ranks:05d}.safetensors", *([STEPS_FILE] if rank == 0 else [])]


def assign_owners(sizes: Mapping[str, int], num_ranks: int) -> dict[str, int]:
    """The rank that writes each parameter: largest first, each to the rank with the least yet."""
    load = [0] * num_ranks
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = load.index(min(load))
        load[owners[name]] += sizes[name]
    return owners

"""Checkpoints in safetensors from which any number of ranks, ZeRO stage or offload can resume.

A parameter is stored unsharded, in fp32, as `weight/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME`, in
the file of the rank that owns it. Only trainable parameters are stored; frozen ones come from the
base model.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter

from medgpt.data.loader.packing import balance
from medgpt.engine import state

STEPS_FILE = "engine.json"


@dataclass(frozen=True)
class Snapshot:
    """The data that one rank writes: copies, so that training can continue meanwhile."""

    tensors: dict[str, Tensor]
    rank: int
    num_ranks: int
    counts: dict[str, int]

    def write(self, directory: Path) -> list[str]:
        """Write this rank's file, and on rank 0 the step counts; return the file names."""
        directory.mkdir(parents=True, exist_ok=True)
        name = f"rank-{self.rank:05d}-of-{self.num_ranks:05d}.safetensors"
        save_file(self.tensors, directory / name)
        if self.rank > 0:
            return [name]
        (directory / STEPS_FILE).write_text(json.dumps(self.counts), "utf-8")
        return [name, STEPS_FILE]


def snapshot(
    params: Mapping[str, Parameter],
    adam: torch.optim.AdamW,
    optimizer: state.DeepSpeedOptimizer,
    *,
    steps: int,
) -> Snapshot:
    """Copy the parameters that this rank owns, with their moments, to the CPU. Collective."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    sizes = {name: state.full_shape(param).numel() for name, param in params.items()}
    owners = assign_owners(sizes, num_ranks)
    tensors: dict[str, Tensor] = {}
    for name, param in params.items():
        for kind in state.STATE_KINDS:
            full = state.gather_full(optimizer, param, kind)
            if owners[name] == rank:
                tensors[f"{kind}/{name}"] = full.to("cpu", torch.float32, copy=True).contiguous()
    counts = {"steps": steps, "adam_steps": state.adam_step(adam, optimizer)}
    return Snapshot(tensors, rank, num_ranks, counts)


def load(
    directory: Path,
    params: Mapping[str, Parameter],
    adam: torch.optim.AdamW,
    optimizer: state.DeepSpeedOptimizer,
) -> int:
    """Restore weights, moments and Adam's step count; return the number of steps. Collective.

    Raises:
        ValueError: the checkpoint belongs to a model with other trainable parameters.
    """
    counts = json.loads((directory / STEPS_FILE).read_text("utf-8"))
    stored: set[str] = set()
    for file in sorted(directory.glob("rank-*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                kind, name = key.split("/", 1)
                assert kind in state.STATE_KINDS
                stored.add(key)
                if name in params:
                    state.scatter_full(optimizer, params[name], kind, tensors.get_tensor(key))
    expected = {f"{kind}/{name}" for kind in state.STATE_KINDS for name in params}
    if stored != expected:
        some = ", ".join(sorted(stored ^ expected)[:3])
        raise ValueError(f"{directory} is a checkpoint of another model: they differ in {some}")
    state.set_adam_step(adam, optimizer, counts["adam_steps"])
    state.refresh_weights(optimizer)
    return counts["steps"]


def assign_owners(sizes: Mapping[str, int], num_ranks: int) -> dict[str, int]:
    """Assign each parameter to the rank that writes it: largest first, to the least loaded rank."""
    names = sorted(sizes)
    owners = balance(np.array([sizes[name] for name in names], np.int64), num_ranks)
    return dict(zip(names, owners.tolist(), strict=True))

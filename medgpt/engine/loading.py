"""Large models: build them partitioned, fill them from safetensors one tensor at a time."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride, ZeroParamStatus
from safetensors import safe_open
from torch import Tensor, nn

from medgpt.config.train import EngineConfig
from medgpt.engine import state
from medgpt.engine.setup import compute_dtype, deepspeed_config, ensure_process_group


@contextlib.contextmanager
def partitioned_init(config: EngineConfig, device: torch.device) -> Iterator[None]:
    """At ZeRO-3, modules built inside are partitioned over the ranks while they are made.

    Their weights have the dtype of the run and hold nothing useful until `load_safetensors`.
    """
    if config.zero_stage < 3:
        yield
        return
    ensure_process_group(device)
    dtype, dtype_before = compute_dtype(config, device), torch.get_default_dtype()
    init = deepspeed.zero.Init(
        config_dict_or_path=deepspeed_config(config, device, max_grad_norm=0.0),
        dtype=dtype,
        # its override of dtypes also rounds what must stay fp32, as rotary frequencies
        tensor_overrides=[DeepSpeedTensorOverride.device],
    )
    torch.set_default_dtype(dtype)
    try:
        with init:
            yield
    finally:
        torch.set_default_dtype(dtype_before)


def load_safetensors(module: nn.Module, files: Sequence[Path]) -> tuple[list[str], list[str]]:
    """Fill parameters and persistent buffers; returns the names missing in `files` and unexpected.

    One tensor at a time; at ZeRO-3 a rank reads no more than its part. Every rank calls it. Tied
    weights need one of their names.

    Raises:
        ValueError: a tensor has another shape than the module's.
    """
    targets = module.state_dict(keep_vars=True)
    filled: set[int] = set()
    unexpected = []
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                if name not in targets:
                    unexpected.append(name)
                    continue
                shape = torch.Size(tensors.get_slice(name).get_shape())
                if shape != state.full_shape(targets[name]):
                    expected = tuple(state.full_shape(targets[name]))
                    raise ValueError(
                        f"{file}: {name} has shape {tuple(shape)}, the model's is {expected}"
                    )
                _copy_shard(targets[name], tensors, name)
                filled.add(id(targets[name]))
    missing = [name for name, tensor in targets.items() if id(tensor) not in filled]
    return missing, unexpected


@torch.no_grad()
def _copy_shard(target: Any, tensors: safe_open, name: str) -> None:
    """Copy this rank's part into `target`, a tensor or what ZeRO-3 made of it."""
    if not state.is_zero_param(target):
        target.copy_(tensors.get_tensor(name))
        return
    assert target.ds_status is ZeroParamStatus.NOT_AVAILABLE, "load before the engine is made"
    shard = target.ds_tensor  # the last ranks' parts may reach past the end
    start = min(dist.get_rank() * shard.numel(), target.ds_numel)
    stop = min(start + shard.numel(), target.ds_numel)
    shard[: stop - start].copy_(_read_elements(tensors, name, start, stop))


def _read_elements(tensors: safe_open, name: str, start: int, stop: int) -> Tensor:
    """Elements `start` to `stop` of the flattened tensor; only the rows that hold them are read."""
    tensor_slice = tensors.get_slice(name)
    shape = tensor_slice.get_shape()
    if not shape:
        return tensors.get_tensor(name).flatten()[start:stop]
    row_numel = math.prod(shape[1:])
    first_row = start // row_numel
    rows = tensor_slice[first_row : -(-stop // row_numel)].flatten()
    return rows[start - first_row * row_numel : stop - first_row * row_numel]

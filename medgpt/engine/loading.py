"""Build large models partitioned over the ranks and load safetensors one tensor at a time."""

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

from medgpt.config.data import Packing
from medgpt.config.model import ModelConfig
from medgpt.config.train import EngineConfig
from medgpt.engine import state
from medgpt.engine.setup import deepspeed_config, ensure_process_group
from medgpt.models.load import build_empty_model, compute_dtype, training_attention
from medgpt.models.model_files import (
    HeadKind,
    check_max_length,
    check_no_missing_weights,
    load_hf_config,
    weight_files,
)
from medgpt.models.weight_layout import WeightGroup, groups_in_files


@contextlib.contextmanager
def partitioned_init(config: EngineConfig, device: torch.device) -> Iterator[None]:
    """At ZeRO-3, partition modules built inside this context over the ranks.

    Their weights have the dtype of the run and are uninitialized until `load_safetensors`.
    """
    if config.zero_stage < 3:
        yield
        return
    ensure_process_group(device)
    dtype, dtype_before = compute_dtype(config.precision, device.type), torch.get_default_dtype()
    init = deepspeed.zero.Init(
        config_dict_or_path=deepspeed_config(config, device, max_grad_norm=0.0),
        dtype=dtype,
        # its dtype override would also round tensors that must stay fp32, like rotary frequencies
        tensor_overrides=[DeepSpeedTensorOverride.device],
    )
    torch.set_default_dtype(dtype)
    try:
        with init:
            yield
    finally:
        torch.set_default_dtype(dtype_before)


def build_partitioned(
    config: ModelConfig,
    engine: EngineConfig,
    device: torch.device,
    *,
    head_kind: HeadKind,
    max_length: int | None = None,
    packing: Packing = "auto",
) -> Any:
    """Build a saved model that no rank ever holds completely. Every rank must call it.

    Raises ConfigError if config.name cannot be loaded with this head, or lacks weights. A missing
    value head stays uninitialized.
    """
    assert config.name is not None
    dtype = compute_dtype(engine.precision, device.type)
    hf_config = load_hf_config(config, head_kind)
    check_max_length(hf_config, max_length)
    attention = training_attention(config, hf_config, head_kind, dtype=dtype, packing=packing)
    with partitioned_init(engine, device):
        model = build_empty_model(config, head_kind=head_kind, dtype=dtype, attention=attention)
    missing, _ = load_safetensors(model, weight_files(config.name))
    check_no_missing_weights(config.name, missing, head_kind)
    return model


def load_safetensors(module: nn.Module, files: Sequence[Path]) -> tuple[list[str], list[str]]:
    """Load parameters and persistent buffers; return missing and unexpected names.

    Names and shapes of files are converted as transformers does. Reads one tensor at a time, or the
    tensors that make one of the module; at ZeRO-3 a rank reads only its shard of the others. Every
    rank must call it. Tied weights need only one of their names in `files`.

    Raises:
        ValueError: a tensor has another shape than the module's.
    """
    targets = module.state_dict(keep_vars=True)
    filled: set[int] = set()
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        files_of = {name: tensors for tensors in opened for name in tensors.keys()}  # noqa: SIM118
        groups, unexpected = groups_in_files(module, files_of, targets)
        for group in groups:
            for name, weight in _read_group(group, files_of, module).items():
                if name not in targets:
                    unexpected.append(name)
                    continue
                _check_shape(name, weight.get_shape(), targets[name])
                _copy_shard(targets[name], weight)
                filled.add(id(targets[name]))
    missing = [name for name, tensor in targets.items() if id(tensor) not in filled]
    return missing, unexpected


class _InMemory:
    """A tensor with the interface of safetensors' slices."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor[index]


def _read_group(group: WeightGroup, files_of: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """Return slices of the module's weights that the group makes."""
    if group.converter is None:
        return {group.key: files_of[group.sources[0]].get_slice(group.sources[0])}
    tensors = [files_of[name].get_tensor(name) for name in group.sources]
    return {name: _InMemory(tensor) for name, tensor in group.convert(tensors, module).items()}


def _check_shape(name: str, shape: Sequence[int], target: Tensor) -> None:
    expected = tuple(state.full_shape(target))
    if tuple(shape) != expected:
        raise ValueError(f"{name} has shape {tuple(shape)}, the model's is {expected}")


@torch.no_grad()
def _copy_shard(target: Any, weight: Any) -> None:
    """Copy the tensor, or at ZeRO-3 this rank's shard of it, into `target`.

    Args:
        weight: a slice of safetensors, or an _InMemory.
    """
    if not state.is_zero_param(target):
        target.copy_(weight[...])
        return
    assert target.ds_status is ZeroParamStatus.NOT_AVAILABLE, (
        "load weights before building the engine"
    )
    shard = target.ds_tensor  # the last ranks' shards may reach past the end
    start = min(dist.get_rank() * shard.numel(), target.ds_numel)
    stop = min(start + shard.numel(), target.ds_numel)
    shard[: stop - start].copy_(_read_elements(weight, start, stop))


def _read_elements(weight: Any, start: int, stop: int) -> Tensor:
    """Return elements `start` to `stop` of the flattened tensor; read only the rows with them."""
    shape = weight.get_shape()
    if not shape:
        return weight[...].flatten()[start:stop]
    row_numel = math.prod(shape[1:])
    first_row = start // row_numel
    rows = weight[first_row : -(-stop // row_numel)].flatten()
    return rows[start - first_row * row_numel : stop - first_row * row_numel]

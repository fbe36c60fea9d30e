"""Read and write fp32 master weights and Adam moments as full tensors, one parameter at a time.

Stage 0 keeps them in the torch optimizer, stages 1 and 2 keep a rank's slice of one flat tensor per
parameter group, stage 3 keeps a rank's slice of every parameter.
"""

from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.partition_parameters import is_zero_param
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor
from torch.nn import Parameter

StateKind = Literal["weight", "exp_avg", "exp_avg_sq"]
STATE_KINDS: tuple[StateKind, ...] = ("weight", "exp_avg", "exp_avg_sq")

DeepSpeedOptimizer: TypeAlias = torch.optim.AdamW | ZeROOptimizer


def full_shape(param: Tensor) -> torch.Size:
    """Return the shape of the full parameter, even if ZeRO-3 keeps only a part of it here."""
    return param.ds_shape if is_zero_param(param) else param.shape  # type: ignore[attr-defined]


def master_weights(optimizer: DeepSpeedOptimizer) -> list[Tensor]:
    """Return the fp32 tensors of this rank that Adam updates."""
    if isinstance(optimizer, torch.optim.AdamW):
        return [param for group in optimizer.param_groups for param in group["params"]]
    if isinstance(optimizer, BF16_Optimizer):
        return optimizer.fp32_groups_flat_partition
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return optimizer.fp32_partitioned_groups_flat
    assert isinstance(optimizer, DeepSpeedZeroOptimizer), type(optimizer)
    return optimizer.single_partition_of_fp32_groups


def create_moments(adam: torch.optim.AdamW, optimizer: DeepSpeedOptimizer) -> None:
    """Create zero moments; torch creates them in the first step, too late to save or load them."""
    for weight in master_weights(optimizer):
        adam.state[weight] = {
            "step": torch.zeros((), dtype=torch.float32, device=weight.device),
            "exp_avg": torch.zeros_like(weight, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(weight, requires_grad=False),
        }
    if isinstance(optimizer, BF16_Optimizer | DeepSpeedZeroOptimizer):
        optimizer._lazy_init_hp_params_optimizer_state()


def adam_step(adam: torch.optim.AdamW, optimizer: DeepSpeedOptimizer) -> int:
    """Return the number of updates so far: the engine's steps without those that were skipped."""
    return int(adam.state[master_weights(optimizer)[0]]["step"])


def set_adam_step(adam: torch.optim.AdamW, optimizer: DeepSpeedOptimizer, step: int) -> None:
    for master in master_weights(optimizer):
        adam.state[master]["step"].fill_(step)


def gather_full(optimizer: DeepSpeedOptimizer, param: Parameter, kind: StateKind) -> Tensor:
    """Return the full fp32 tensor of a trainable parameter, on every rank. Collective."""
    if isinstance(optimizer, torch.optim.AdamW):
        return param.detach() if kind == "weight" else optimizer.state[param][kind]
    if kind == "weight":
        full = safe_get_full_fp32_param(param)
    else:
        full = safe_get_full_optimizer_state(param, kind)
    assert full is not None, "not a parameter of this engine"
    return full


@torch.no_grad()
def scatter_full(
    optimizer: DeepSpeedOptimizer, param: Parameter, kind: StateKind, value: Tensor
) -> None:
    """Write this rank's part of the full fp32 tensor `value`; `refresh_weights` must follow."""
    if isinstance(optimizer, torch.optim.AdamW):
        (param if kind == "weight" else optimizer.state[param][kind]).copy_(value)
    elif is_zero_param(param):
        part = _partition(value, param.ds_tensor.numel())  # type: ignore[attr-defined]
        if kind == "weight":
            safe_set_local_fp32_param(param, part)
        else:
            safe_set_local_optimizer_state(param, part, kind)
    elif kind == "weight":
        safe_set_full_fp32_param(param, value)
    else:
        safe_set_full_optimizer_state(param, value, kind)


def _partition(value: Tensor, size: int) -> Tensor:
    """Return this rank's slice of `value`, zero-padded to `size` (the last ones may be short)."""
    partition = value.new_zeros(size)
    own_slice = value.flatten()[dist.get_rank() * size :][:size]
    partition[: own_slice.numel()] = own_slice
    return partition


def refresh_weights(optimizer: DeepSpeedOptimizer) -> None:
    """Copy the master weights into the weights of the forward pass. Collective."""
    if isinstance(optimizer, torch.optim.AdamW):
        return  # they are the same tensors
    if isinstance(optimizer, BF16_Optimizer | DeepSpeedZeroOptimizer):
        optimizer.update_lp_params()
        return
    assert isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3)
    optimizer._partition_all_parameters()  # small ones too; the next forward gathers them again
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)


def drop_gradients(optimizer: DeepSpeedOptimizer) -> None:
    """Clear gradients after a skipped step; with offload, ZeRO 1 and 2 would keep their sums."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)

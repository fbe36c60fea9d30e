"""Set up what DeepSpeed needs before an engine is built: process group and config."""

import ctypes
import os
import platform
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from medgpt.config.base import ConfigError
from medgpt.config.train import BUCKET_ELEMENTS, EngineConfig
from medgpt.models.load import compute_dtype


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed tensors in this process and reuse it.

    By default large blocks return to the system at once and every new page is cleared, which slows
    down training steps on a CPU. The constants are those of malloc.h.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_threshold, 32 << 20)  # the maximum
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_top_pad, 64 << 20)


def effective_zero_stage(config: EngineConfig, dtype: torch.dtype) -> int:
    """Return the ZeRO stage to run: stage 0 cannot accumulate gradients of bf16 weights in fp32."""
    return 1 if config.zero_stage == 0 and dtype == torch.bfloat16 else config.zero_stage


def ensure_process_group(device: torch.device) -> None:
    """Make DeepSpeed use the default process group; create one of size 1 if there is none."""
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage] - documented
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index or 0)  # DeepSpeed reads its device from there
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def deepspeed_config(
    config: EngineConfig, device: torch.device, *, max_grad_norm: float
) -> dict[str, Any]:
    """Return DeepSpeed's config; raise ConfigError if offload_optimizer is set without ZeRO."""
    dtype = compute_dtype(config.precision, device.type)
    stage = effective_zero_stage(config, dtype)
    if config.offload_optimizer and config.zero_stage == 0:
        raise ConfigError("engine.offload_optimizer=true needs engine.zero_stage 1, 2 or 3, not 0")
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # unused: the caller owns the accumulation boundary
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_grad_norm if stage > 0 else 0.0,  # stage 0: see Engine
        "gradient_allreduce_op": "mean" if stage > 0 else "sum",  # stage 3 knows the mean only
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # its CPU Adam is compiled at run time
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }

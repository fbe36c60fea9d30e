"""DeepSpeed settings for transformers' Trainer, for stages that train with a library."""

import os
from typing import Any

import deepspeed
import torch
from accelerate import PartialState
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from medgpt.config.train import EngineConfig
from medgpt.engine.setup import deepspeed_config


def trainer_config(config: EngineConfig, device: torch.device) -> dict[str, Any]:
    """Return the config for `TrainingArguments(deepspeed=...)`; the Trainer fills in "auto"."""
    engine_settings = deepspeed_config(config, device, max_grad_norm=0.0)
    kept_keys = ("zero_optimization", "zero_force_ds_cpu_optimizer", "communication_data_type")
    return {
        **{key: engine_settings[key] for key in kept_keys},
        "zero_optimization": engine_settings["zero_optimization"]
        | {"stage3_gather_16bit_weights_on_model_save": True},
        "bf16": {"enabled": engine_settings["bf16"]["enabled"]},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def use_process_group(device: torch.device) -> None:
    """Make accelerate run DeepSpeed on the ranks of the default process group.

    Without a GPU it would otherwise treat each rank as a single process. `TrainingArguments` needs
    `accelerator_config={"use_configured_state": True}`.
    """
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    try:
        PartialState(backend="gloo" if device.type == "cpu" else "nccl")
    finally:
        del os.environ["ACCELERATE_USE_DEEPSPEED"]


def load_weights_only() -> None:
    """Make torch.load accept only tensors, numbers and these classes in DeepSpeed's checkpoints."""
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])

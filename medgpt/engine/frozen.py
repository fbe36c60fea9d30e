"""An engine for models that only run forward; at ZeRO-3 they are partitioned over the ranks."""

from typing import Any

import deepspeed
import torch
from torch import nn

from medgpt.config.train import EngineConfig
from medgpt.engine.setup import compute_dtype, deepspeed_config, ensure_process_group


class FrozenEngine:
    """Runs `module` without gradients. At ZeRO-3 every rank must make the same number of calls."""

    def __init__(self, module: nn.Module, config: EngineConfig, device: torch.device) -> None:
        ensure_process_group(device)
        module.requires_grad_(False).eval()
        dtype = compute_dtype(config, device)
        if config.zero_stage < 3:
            self.run: Any = module.to(device)
            return
        settings = deepspeed_config(config, device, max_grad_norm=0.0)
        settings["bf16"] = {"enabled": dtype == torch.bfloat16}
        self.run, *_ = deepspeed.initialize(model=module, config=settings, dist_init_required=False)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output."""
        return self.run(*args, **kwargs)

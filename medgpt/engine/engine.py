"""The Engine class: DeepSpeed behind forward, backward, step, snapshot and load."""

import math
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from torch import Tensor, nn

from medgpt.config.train import EngineConfig, OptimizerConfig
from medgpt.engine import checkpoint, schedule, state
from medgpt.engine.setup import deepspeed_config, ensure_process_group
from medgpt.models.packed import PackedModel


class Engine:
    """Trains the parameters of `module` that require gradients.

    Every rank makes the same calls; from ZeRO-2 on that includes the number of forward and backward
    passes. A rank without data runs micro-batches whose loss is zero (`loss * 0`, not a constant).
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        engine: EngineConfig,
        optimizer: OptimizerConfig,
        total_steps: int,
        device: torch.device,
    ) -> None:
        ensure_process_group(device)
        self.module = module
        self.steps = 0
        """Number of optimizer steps so far."""
        self._optimizer_config = optimizer
        self._total_steps = total_steps
        self._adam = torch.optim.AdamW(
            parameter_groups(module, optimizer.weight_decay),
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            eps=optimizer.eps,
            fused=True,  # no temporary copies of the flat partition; not compiled at run time
        )
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=self._adam,
            config=deepspeed_config(engine, device, max_grad_norm=optimizer.max_grad_norm),
            dist_init_required=False,
        )
        wrapped = self._engine.optimizer
        assert isinstance(wrapped, torch.optim.AdamW | ZeROOptimizer), type(wrapped)
        self._optimizer: state.DeepSpeedOptimizer = wrapped
        self._grad_norm = math.nan
        self._grad_divisor = dist.get_world_size()
        """Divisor that DeepSpeed applies to the sum of the ranks' gradients."""
        if isinstance(self._optimizer, torch.optim.AdamW):
            self._adam.register_step_pre_hook(lambda *_: self._clip_gradients())
            self._grad_divisor = 1
            # a single rank would copy all gradients into a buffer and back, to no effect
            self._engine.enable_backward_allreduce = dist.get_world_size() > 1
        state.create_moments(self._adam, self._optimizer)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the latest step; before the first step, that of the first."""
        return schedule.learning_rate(
            max(self.steps - 1, 0), self._total_steps, self._optimizer_config
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this rank's share of a loss divided by the global token count."""
        self._engine.backward(loss * self._grad_divisor, scale_wrt_gas=False)

    def step(self) -> float:
        """Clip gradients, update, clear gradients; return the global norm before clipping.

        If the norm is not finite, weights and moments stay unchanged; the step still counts.
        """
        rate = schedule.learning_rate(self.steps, self._total_steps, self._optimizer_config)
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._engine.step()
        self.steps += 1
        if not isinstance(self._optimizer, torch.optim.AdamW):
            norm = self._engine.get_global_grad_norm()
            assert norm is not None
            self._grad_norm = float(norm)
        if not math.isfinite(self._grad_norm):
            state.drop_gradients(self._optimizer)
        return self._grad_norm

    def snapshot(self) -> checkpoint.Snapshot:
        """Copy all that `load` needs. Collective; then every rank writes its part on its own."""
        return checkpoint.snapshot(
            self._trainable_parameters(), self._adam, self._optimizer, steps=self.steps
        )

    def load(self, directory: Path) -> None:
        """Resume from a snapshot written at any world size, ZeRO stage and offload.

        Collective. `directory` must hold the files of all ranks.
        """
        self.steps = checkpoint.load(
            directory, self._trainable_parameters(), self._adam, self._optimizer
        )

    def _trainable_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def _clip_gradients(self) -> None:
        """Clip for the torch optimizer of stage 0; DeepSpeed's optimizers clip themselves."""
        params = list(self._trainable_parameters().values())
        for param in params:
            if param.grad is None:  # its moments decay, as with DeepSpeed's optimizers
                param.grad = torch.zeros_like(param)
        limit = self._optimizer_config.max_grad_norm or math.inf
        self._grad_norm = float(nn.utils.clip_grad_norm_(params, limit))
        if not math.isfinite(self._grad_norm):
            for param in params:
                param.grad = None  # Adam skips it


class FrozenEngine:
    """Runs `module` without gradients. At ZeRO-3 every rank must make the same number of calls."""

    def __init__(self, module: PackedModel, config: EngineConfig, device: torch.device) -> None:
        ensure_process_group(device)
        module.requires_grad_(False).eval()
        self.is_padded = module.is_padded
        if config.zero_stage < 3:
            self.run: Any = module.to(device)
            return
        settings = deepspeed_config(config, device, max_grad_norm=0.0)
        settings["bf16"] = {"enabled": settings["bf16"]["enabled"]}
        self.run, *_ = deepspeed.initialize(model=module, config=settings, dist_init_required=False)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output."""
        return self.run(*args, **kwargs)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's groups: weight decay on matrices, none on vectors and embeddings."""
    embeddings = {
        id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for param in module.parameters():
        if param.requires_grad:
            is_matrix = len(state.full_shape(param)) > 1 and id(param) not in embeddings
            (matrices if is_matrix else others).append(param)
    groups = [
        {"name": "decayed", "params": matrices, "weight_decay": weight_decay},
        {"name": "others", "params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]

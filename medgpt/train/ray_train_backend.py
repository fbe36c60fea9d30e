"""Adapter to Ray Train: starts workers in a torch process group. The loop itself is in loop.py.

A lighter TorchTrainer: each Ray process costs CPU time, so two callbacks with processes of their
own are left out, and only the workers import torch, not the driver and the controller.
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend, BackendConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from medgpt.cluster import ray_train_internals as internals

# workers read their streams themselves; when the controller dies, its command and job end, and Ray
# removes the placement group with them
UNUSED_CALLBACKS = (internals.DatasetsCallback, internals.PlacementGroupCleanerCallback)
COLLECTIVE_TIMEOUT_S = 1800
LEAVE_TIMEOUT_S = 30


class LightTorchTrainer(DataParallelTrainer):
    """Runs `train_loop_per_worker` in a torch process group: nccl on GPUs, else gloo."""

    def _create_default_callbacks(self) -> list:
        """Leave out unused callbacks; Ray Train has no setting for it."""
        callbacks = super()._create_default_callbacks()
        return [c for c in callbacks if not isinstance(c, UNUSED_CALLBACKS)]


@dataclass
class ProcessGroupConfig(BackendConfig):
    gpu: bool

    @property
    def backend_cls(self) -> type[Backend]:
        return _ProcessGroupBackend

    @property
    def framework(self) -> internals.TrainingFramework:  # type: ignore[override] - as Ray's own backends do
        return internals.TrainingFramework.TORCH

    def to_dict(self) -> dict[str, Any]:
        return {"gpu": self.gpu}


class _ProcessGroupBackend(Backend):
    share_cuda_visible_devices = True

    def on_start(
        self, worker_group: internals.BaseWorkerGroup, backend_config: BackendConfig
    ) -> None:
        """Set up the process group; called again after every loss or resize of workers."""
        assert isinstance(backend_config, ProcessGroupConfig)
        address, port = worker_group.execute_single(0, internals.get_address_and_port)
        worker_group.execute(
            _join_process_group, address, port, "nccl" if backend_config.gpu else "gloo"
        )

    def on_shutdown(
        self, worker_group: internals.BaseWorkerGroup, backend_config: BackendConfig
    ) -> None:
        with suppress(GetTimeoutError):  # workers that do not answer are killed next
            leave_refs: Any = worker_group.execute_async(_leave_process_group)
            ray.get(leave_refs, timeout=LEAVE_TIMEOUT_S)


def _join_process_group(address: str, port: int, backend: str) -> None:
    import os

    import torch
    from ray.train import get_context
    from ray.train.torch import get_device

    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    internals.setup_torch_process_group(
        backend=backend,
        world_rank=get_context().get_world_rank(),
        world_size=get_context().get_world_size(),
        init_method="env://",
        timeout_s=COLLECTIVE_TIMEOUT_S,
    )


def _leave_process_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()

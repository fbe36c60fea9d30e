"""Ray Train's trainer for torch, without what takes time from the training.

Each Ray process wakes a hundred times a second and imports libraries for seconds when it starts. So
the trainer does without two processes that this project has no use for, and torch is imported by
the workers alone: Ray's TorchTrainer also loads it into the driver and the controller.
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend, BackendConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from medgpt.cluster.ray_internals import (
    BaseWorkerGroup,
    DatasetsCallback,
    PlacementGroupCleanerCallback,
    TrainingFramework,
    get_address_and_port,
)

# workers read their streams themselves; when the controller dies, the command that started it
# fails, and with its job Ray gives the placement group back
UNUSED_CALLBACKS = (DatasetsCallback, PlacementGroupCleanerCallback)
COLLECTIVE_TIMEOUT_S = 1800  # of a collective
LEAVE_TIMEOUT_S = 30


class LightTorchTrainer(DataParallelTrainer):
    """`train_loop_per_worker` on ranks of one process group, nccl on GPUs and gloo elsewhere."""

    def _create_default_callbacks(self) -> list:
        """Ray Train has no setting for it."""
        return [
            callback
            for callback in super()._create_default_callbacks()
            if not isinstance(callback, UNUSED_CALLBACKS)
        ]


@dataclass
class ProcessGroupConfig(BackendConfig):
    gpu: bool

    @property
    def backend_cls(self) -> type[Backend]:
        return _ProcessGroupBackend

    @property
    def framework(self) -> TrainingFramework:  # type: ignore[override] - Ray's own do the same
        return TrainingFramework.TORCH

    def to_dict(self) -> dict[str, Any]:
        return {"gpu": self.gpu}


class _ProcessGroupBackend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        """Called for every group of workers, so after every loss or change of size."""
        assert isinstance(backend_config, ProcessGroupConfig)
        address, port = worker_group.execute_single(0, get_address_and_port)
        worker_group.execute(
            _join_process_group, address, port, "nccl" if backend_config.gpu else "gloo"
        )

    def on_shutdown(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        with suppress(GetTimeoutError):  # workers that do not answer are ended next
            leave_refs: Any = worker_group.execute_async(_leave_process_group)
            ray.get(leave_refs, timeout=LEAVE_TIMEOUT_S)


def _join_process_group(address: str, port: int, backend: str) -> None:
    import os

    import torch
    from ray.train import get_context
    from ray.train.torch import get_device

    from medgpt.cluster.ray_internals import (
        _set_torch_distributed_env_vars,
        _setup_torch_process_group,
    )

    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    _set_torch_distributed_env_vars()
    _setup_torch_process_group(
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

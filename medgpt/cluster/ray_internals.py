"""All imports of Ray's private modules, except Ray Data's in `data/loader/ray_internals.py`.

Ray may change these names in any release, so a test checks each of them against the pinned one.
A name is imported on first use: importing Ray Train takes a second that most commands do not need.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # pyright does not see the names of generated code
    from ray._common.utils import get_default_system_temp_dir
    from ray._private import ray_constants
    from ray._private.runtime_env.packaging import create_package
    from ray._private.state import state as ray_state
    from ray._private.worker import global_worker
    from ray.core.generated import autoscaler_pb2
    from ray.core.generated.autoscaler_pb2 import GangResourceRequest  # pyright: ignore
    from ray.core.generated.common_pb2 import LabelSelectorOperator  # pyright: ignore
    from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import (
        ResourceRequestPriority,
    )
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )
    from ray.train._internal.base_worker_group import BaseWorkerGroup
    from ray.train._internal.utils import get_address_and_port
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import (
        PlacementGroupCleanerCallback,
    )
    from ray.train.v2._internal.execution.callback import ControllerCallback
    from ray.train.v2._internal.execution.controller.state import (
        InitializingState,
        ReschedulingState,
        RestartingState,
        SchedulingState,
    )
    from ray.train.v2._internal.util import TrainingFramework

_COORDINATION = "ray.data._internal.cluster_autoscaler"
_CONTROLLER = "ray.train.v2._internal.execution.controller.state"
MODULE_OF = {
    "get_default_system_temp_dir": "ray._common.utils",
    "ray_constants": "ray._private",
    "create_package": "ray._private.runtime_env.packaging",
    "ray_state": "ray._private.state:state",
    "global_worker": "ray._private.worker",
    "autoscaler_pb2": "ray.core.generated",
    "GangResourceRequest": "ray.core.generated.autoscaler_pb2",
    "LabelSelectorOperator": "ray.core.generated.common_pb2",
    "ResourceRequestPriority": f"{_COORDINATION}.base_autoscaling_coordinator",
    "get_or_create_autoscaling_coordinator": f"{_COORDINATION}.default_autoscaling_coordinator",
    "BaseWorkerGroup": "ray.train._internal.base_worker_group",
    "get_address_and_port": "ray.train._internal.utils",
    "_set_torch_distributed_env_vars": "ray.train.torch.config",
    "_setup_torch_process_group": "ray.train.torch.config",
    "DatasetsCallback": "ray.train.v2._internal.callbacks.datasets",
    "PlacementGroupCleanerCallback": "ray.train.v2._internal.callbacks.placement_group_callback",
    "ControllerCallback": "ray.train.v2._internal.execution.callback",
    "InitializingState": _CONTROLLER,
    "ReschedulingState": _CONTROLLER,
    "RestartingState": _CONTROLLER,
    "SchedulingState": _CONTROLLER,
    "TrainingFramework": "ray.train.v2._internal.util",
}
"""Module of each name in Ray; `module:name` if Ray uses another name."""
__all__ = [
    "BaseWorkerGroup",
    "ControllerCallback",
    "DatasetsCallback",
    "GangResourceRequest",
    "InitializingState",
    "LabelSelectorOperator",
    "PlacementGroupCleanerCallback",
    "ReschedulingState",
    "ResourceRequestPriority",
    "RestartingState",
    "SchedulingState",
    "TrainingFramework",
    "_set_torch_distributed_env_vars",
    "_setup_torch_process_group",
    "autoscaler_pb2",
    "create_package",
    "get_address_and_port",
    "get_default_system_temp_dir",
    "get_or_create_autoscaling_coordinator",
    "global_worker",
    "ray_constants",
    "ray_state",
]


def __getattr__(name: str) -> Any:
    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, name_in_ray = MODULE_OF[name].partition(":")
    loaded = importlib.import_module(module)
    if hasattr(loaded, name_in_ray or name):
        return getattr(loaded, name_in_ray or name)
    return importlib.import_module(f"{module}.{name}")

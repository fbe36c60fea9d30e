"""The pinned Ray has every private name that medgpt uses."""

import importlib

import pytest

# an import fails with the name that Ray no longer has
from medgpt.cluster import ray_internals, ray_train_internals
from medgpt.data.loader import ray_internals as data_internals


@pytest.mark.parametrize(
    ("owner", "method"),
    [
        (ray_internals.ray_state, "get_draining_nodes"),
        (ray_internals.ray_state, "actor_table"),
        (ray_internals.ray_state, "get_cluster_config"),
        (ray_internals.ray_state, "get_max_resources_from_cluster_config"),
        (ray_internals.autoscaler_pb2, "GetClusterStatusReply"),
        (ray_internals.autoscaler_pb2, "GangResourceRequest"),
        (ray_train_internals.ControllerCallback, "after_controller_state_update"),
        (data_internals.ExecutionCallback, "on_execution_step"),
        (data_internals.ExecutionCallback, "before_execution_starts"),
    ],
)
def test_used_and_overridden_methods_exist(owner: object, method: str) -> None:
    assert callable(getattr(owner, method))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("ray._private.ray_constants", "ENABLE_RAY_CLUSTER"),
        ("ray.core.generated.common_pb2", "LabelSelectorOperator"),
        ("ray.train.torch.config", "_set_torch_distributed_env_vars"),
        ("ray.train.torch.config", "_setup_torch_process_group"),
        (
            "ray.data._internal.cluster_autoscaler.default_cluster_autoscaler_v2",
            "DefaultClusterAutoscalerV2",
        ),
    ],
)
def test_names_that_medgpt_sets_or_imports_late_exist(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


def test_ray_data_has_a_settable_scale_up_threshold() -> None:
    from ray.data._internal.cluster_autoscaler import default_cluster_autoscaler_v2 as module

    source = importlib.import_module("inspect").getsource(module.DefaultClusterAutoscalerV2)
    assert "_cluster_scaling_up_util_threshold" in source

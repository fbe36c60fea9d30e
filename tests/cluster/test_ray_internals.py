"""The pinned Ray has every private name that medgpt uses."""

import importlib

import pytest

from medgpt.cluster import ray_internals
from medgpt.data.loader import ray_internals as data_internals


@pytest.mark.parametrize("name", sorted(ray_internals.MODULE_OF))
def test_the_pinned_ray_has_the_name(name: str) -> None:
    assert getattr(ray_internals, name) is not None


def test_every_exported_name_has_a_module() -> None:
    assert sorted(ray_internals.__all__) == sorted(ray_internals.MODULE_OF)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        ray_internals.nosuch  # noqa: B018


@pytest.mark.parametrize(
    ("owner", "method"),
    [
        (ray_internals.ray_state, "get_draining_nodes"),
        (ray_internals.ray_state, "actor_table"),
        (ray_internals.ray_state, "get_cluster_config"),
        (ray_internals.ray_state, "get_max_resources_from_cluster_config"),
        (ray_internals.ControllerCallback, "after_controller_state_update"),
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
        (
            "ray.data._internal.cluster_autoscaler.default_cluster_autoscaler_v2",
            "DefaultClusterAutoscalerV2",
        ),
    ],
)
def test_the_settings_that_medgpt_changes_exist(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


def test_ray_data_has_a_settable_scale_up_threshold() -> None:
    from ray.data._internal.cluster_autoscaler import default_cluster_autoscaler_v2 as module

    source = importlib.import_module("inspect").getsource(module.DefaultClusterAutoscalerV2)
    assert "_cluster_scaling_up_util_threshold" in source

"""Waiting for resources in a cluster that cannot grow; tests/clusters has one that can."""

import pytest

from medgpt.cluster.capacity import autoscaling_state, has_autoscaler
from medgpt.cluster.wait_for_resources import wait_for_data_task_resources, wait_for_resources
from medgpt.config.base import ConfigError
from medgpt.config.train import ClusterConfig

pytestmark = pytest.mark.ray


def error_of(cluster: ClusterConfig) -> str:
    lines: list[str] = []
    with pytest.raises(ConfigError) as error:
        wait_for_resources(cluster, lines.append)
    assert not lines  # nothing to wait for
    return str(error.value)


def test_a_cluster_without_autoscaler_is_not_waited_for(ray_session: None) -> None:
    assert autoscaling_state() is None
    assert not has_autoscaler()
    message = error_of(ClusterConfig(num_workers=9))
    assert message.startswith("cluster.num_workers=9 (9 x (1 CPU)) can never be placed: ")
    assert "the cluster has 1 x (4 CPU) and no autoscaler" in message
    message = error_of(ClusterConfig(gpus_per_worker=1))
    assert "(1 x (1 CPU, 1 GPU)) can never be placed: no node can hold one" in message


def test_labels_that_no_node_has_are_refused(ray_session: None) -> None:
    message = error_of(ClusterConfig(labels={"role": "poet"}))
    assert "(1 x (1 CPU, role=poet)) can never be placed: no node can hold one" in message


def test_free_resources_are_not_waited_for(ray_session: None) -> None:
    lines: list[str] = []
    wait_for_resources(ClusterConfig(num_workers=3), lines.append)
    assert not lines


def test_the_wait_for_a_data_task_is_announced_and_bounded(ray_session: None) -> None:
    lines: list[str] = []
    wait_for_data_task_resources(ClusterConfig(), lines.append)
    assert not lines
    with pytest.raises(ConfigError, match=r"cluster.data_cpus=9: no node can hold .*wait_s=1 s"):
        wait_for_data_task_resources(ClusterConfig(data_cpus=9, wait_s=1), lines.append)
    assert lines == ["waiting up to 1 s for the cluster to grow: a data task needs 9 CPU"]

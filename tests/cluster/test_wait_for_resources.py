"""Room for workers in a cluster that cannot grow; tests/clusters has one that can."""

import pytest

from medgpt.cluster.autoscaler import autoscaling_state, may_grow
from medgpt.cluster.wait_for_resources import await_data_room, await_room
from medgpt.config.base import ConfigError
from medgpt.config.train import ClusterConfig

pytestmark = pytest.mark.ray


def refusal(cluster: ClusterConfig) -> str:
    said: list[str] = []
    with pytest.raises(ConfigError) as error:
        await_room(cluster, said.append)
    assert not said  # nothing to wait for
    return str(error.value)


def test_a_cluster_without_autoscaler_is_not_waited_for(ray_session: None) -> None:
    assert autoscaling_state() is None
    assert not may_grow()
    told = refusal(ClusterConfig(num_workers=9))
    assert told.startswith("cluster.num_workers=9 (9 x (1 CPU)) can never be placed: ")
    assert "the cluster has 1 x (4 CPU) and no autoscaler" in told
    told = refusal(ClusterConfig(gpus_per_worker=1))
    assert "(1 x (1 CPU, 1 GPU)) can never be placed: no node is like that" in told


def test_labels_are_looked_for_on_nodes(ray_session: None) -> None:
    told = refusal(ClusterConfig(labels={"role": "poet"}))
    assert "(1 x (1 CPU, role=poet)) can never be placed: no node is like that" in told


def test_room_that_is_there_is_not_waited_for(ray_session: None) -> None:
    said: list[str] = []
    await_room(ClusterConfig(num_workers=3), said.append)
    assert not said


def test_the_wait_for_room_for_data_is_told_and_bounded(ray_session: None) -> None:
    said: list[str] = []
    await_data_room(ClusterConfig(), said.append)
    assert not said
    with pytest.raises(ConfigError, match=r"cluster.data_cpus=9: no node has room .*wait_s=1 s"):
        await_data_room(ClusterConfig(data_cpus=9, wait_s=1), said.append)
    assert said == ["waiting up to 1 s for the cluster to grow: a data task needs 9 CPU"]

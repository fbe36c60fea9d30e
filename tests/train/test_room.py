"""Room for workers in a cluster that cannot grow; tests/clusters has one that can."""

import pytest

from medgpt.config import ClusterConfig, ConfigError
from medgpt.train.room import autoscaling_state, await_room, may_grow

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
    assert refusal(ClusterConfig(num_workers=9)) == (
        "cluster.num_workers=9 needs 10 CPU in all (data tasks included), the cluster has 4 at "
        "most; lower cluster.num_workers or the CPUs or GPUs of each, or use a larger cluster"
    )
    assert "needs 1 GPU in all" in refusal(ClusterConfig(gpus_per_worker=1))


def test_labels_are_looked_for_on_nodes(ray_session: None) -> None:
    told = refusal(ClusterConfig(labels={"role": "poet"}))
    assert "needs 1 CPU on nodes with role=poet, which have 0 at most" in told


def test_room_that_is_there_is_not_waited_for(ray_session: None) -> None:
    said: list[str] = []
    await_room(ClusterConfig(num_workers=3), said.append)
    assert not said

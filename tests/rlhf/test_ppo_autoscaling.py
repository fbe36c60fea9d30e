"""PPO on a cluster that has no nodes until they are needed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from tests.clusters.local import LocalCluster
from tests.rlhf.command import Command
from tests.rlhf.stages import Parts, write_config

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
GROUPS = {
    "actor": "train",
    "critic": "train",
    "reward": "rollout",
    "reference": "rollout",
    "rollout": "rollout",
}


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster() as cluster:
        yield cluster


def test_ppo_trains_on_nodes_that_come_as_it_needs_them(
    cluster: LocalCluster, parts: Parts, tmp_path: Path
) -> None:
    labels = [f'pools.{role}.labels={{role="{group}"}}' for role, group in GROUPS.items()]
    one = dict.fromkeys(GROUPS, 1)
    write_config(tmp_path, parts, "ppo.max_iterations=2", *labels, workers=one)
    way = {
        "RAY_ADDRESS": f"{ray.util.get_node_ip_address()}:{cluster.port}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(cluster.token),
    }
    assert cluster.raylets() == 1  # the head, which has no CPUs
    with Command(tmp_path, cluster=way) as command:
        command.start()
        command.join()
    assert "for the cluster to grow: a data task needs 1 CPU" in command.said()
    assert command.run.finished
    assert command.step == 2
    groups = cluster.ask("print(json.dumps([node['Labels']['role'] for node in ray.nodes()]))")
    assert {"train", "rollout"} < set(groups)

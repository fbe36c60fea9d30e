"""PPO on an autoscaling cluster that starts without nodes and loses one."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from tests.clusters.local_cluster import LocalCluster
from tests.rlhf.command import Command
from tests.rlhf.hooks import Hold
from tests.rlhf.stages import PPOInputs, write_config
from tests.train.audit_log import assert_every_chunk_once

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


def kill_node_of(pid: int) -> None:
    """Kill the raylet of this worker with all its processes."""
    raylet = psutil.Process(pid).parent()
    assert raylet is not None
    for process in [raylet, *raylet.children(recursive=True)]:
        process.kill()


def test_ppo_trains_on_an_autoscaling_cluster_that_loses_a_node(
    cluster: LocalCluster, ppo_inputs: PPOInputs, tmp_path: Path
) -> None:
    labels = [f'pools.{role}.labels={{role="{group}"}}' for role, group in GROUPS.items()]
    one = dict.fromkeys(GROUPS, 1)
    write_config(tmp_path, ppo_inputs, "ppo.prompt_epochs=1", *labels, workers=one)
    way = {
        "RAY_ADDRESS": f"{ray.util.get_node_ip_address()}:{cluster.port}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(cluster.token),
    }
    assert cluster.num_raylets() == 1  # the head, which has no CPUs
    with Command(tmp_path, cluster=way) as command:
        command.hold_worker(Hold("Actor.update", "Engine.step", step=2))
        command.start()
        learning = command.wait_until_held()
        command.release()
        kill_node_of(learning)  # the only one of its group: the autoscaler brings another
        command.join()
    assert "for the cluster to grow: a data task needs 1 CPU" in command.output()
    assert "continues after iteration 2" in command.output()
    assert command.run.finished
    assert command.step == 3
    assert_every_chunk_once(command.run)
    nodes = cluster.run_program(
        "print(json.dumps([[node['Labels']['role'], node['Alive']] for node in ray.nodes()]))"
    )
    assert ["rollout", True] in nodes
    assert {("train", False), ("train", True)} <= {tuple(node) for node in nodes}
    assert len(nodes) == 5  # and one for data: no pool requested more than it needs

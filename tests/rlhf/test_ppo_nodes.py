"""PPO survives lost nodes and moves its pools off draining nodes."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from medgpt.runs import Run
from tests.rlhf.command import Command
from tests.rlhf.hooks import Hold
from tests.rlhf.inline import comparable_metrics
from tests.rlhf.stages import PPOInputs, write_config
from tests.train.audit_log import assert_every_chunk_once, chunks_by_step
from tests.train.local_cluster import STORE_BYTES, node_pids, started_cluster

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
ONE_EACH = dict.fromkeys(("actor", "critic", "reward", "reference", "rollout"), 1)
LOST = {
    "rollout": Hold("Rollout.generate", "_DecodeState.read", time=3, step=1),
    "actor": Hold("Actor.update", "Engine.step", time=2, step=3),
}
ALL_LOST = {
    "reward": Hold("Reward.score", "ValueModel.forward"),
    "rollout": Hold("Rollout.generate", "_DecodeState.read", time=3, step=1),
    "critic": Hold("Critic.update", "Engine.step", time=2, step=2),
    "reference": Hold("Reference.logprobs", "Policy.forward", step=3),
    "actor": Hold("Actor.update", "Engine.step", time=2, step=4),
}
LEFT = Hold("Rollout.generate", "_DecodeState.read", time=3, step=5)


@pytest.fixture(scope="module")
def undisturbed(
    ppo_inputs: PPOInputs, ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """An uninterrupted run with one worker per pool, on one node."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_config(folder, ppo_inputs, workers=ONE_EACH)
    with Command(folder) as command:
        command.start()
        command.join()
    return command.run


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with started_cluster() as cluster:
        yield cluster


def add_room(cluster: Cluster) -> None:
    """Add a node with room for one pool; the head has none."""
    cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES, resources={"room": 1})


def node_of(cluster: Cluster, pid: int) -> Any:
    (node,) = [node for node in cluster.list_all_nodes() if pid in node_pids(node)]
    return node


def announce_end(cluster: Cluster, node: Any, seconds: float) -> None:
    accepted, why = ray._raylet.GcsClient(address=cluster.address).drain_node(
        node.node_id,
        autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "a test",
        int((time.time() + seconds) * 1000),
    )
    assert accepted, why


@pytest.mark.parametrize(
    "lost", [LOST, pytest.param(ALL_LOST, marks=pytest.mark.slow)], ids=["two", "of each pool"]
)
def test_lost_and_draining_nodes_change_no_number(
    cluster: Cluster, undisturbed: Run, ppo_inputs: PPOInputs, tmp_path: Path, lost: dict[str, Hold]
) -> None:
    write_config(
        tmp_path, ppo_inputs, f"cluster.max_failures={len(lost)}", "cluster.max_preemptions=1",
        *[f"pools.{role}.resources={{room=1}}" for role in ONE_EACH], workers=ONE_EACH,
    )  # fmt: skip
    for _ in ONE_EACH:
        add_room(cluster)
    with Command(tmp_path, cluster={"RAY_ADDRESS": cluster.address}) as command:
        for hold in lost.values():
            command.hold_worker(hold)
            if command.process is None:
                command.start()
            held = command.wait_until_held()
            node = node_of(cluster, held)
            add_room(cluster)
            cluster.remove_node(node, allow_graceful=False)
            command.wait_for(lambda held=held: not psutil.pid_exists(held), "death of the worker")
        command.hold_worker(LEFT)
        ending = node_of(cluster, command.wait_until_held())
        add_room(cluster)
        began = time.monotonic()
        announce_end(cluster, ending, 60)
        command.wait_for(
            lambda: "will be drained in" in command.output(), "message about the draining node"
        )
        command.release()
        command.join()
        assert time.monotonic() - began < 60
    said = command.output()
    print(said)
    assert said.count("the pool is rebuilt") == len(lost)
    assert "a node of the rollout pool will be drained in" in said
    assert comparable_metrics(command.run) == comparable_metrics(undisturbed)
    assert_every_chunk_once(command.run)
    assert chunks_by_step(command.run) == chunks_by_step(undisturbed)

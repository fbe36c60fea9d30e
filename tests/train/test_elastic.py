"""Adding, losing and draining nodes changes the workers but not the training."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from medgpt.runs import Run
from tests.train.audit_log import assert_every_chunk_once, chunks_by_step
from tests.train.local_cluster import (
    CommandDriver,
    add_node,
    node_pids,
    pids_with_title,
    started_cluster,
    train_worker_nodes,
)
from tests.train.test_resume import train_losses
from tests.train.tiny_configs import pretrain_config

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with started_cluster() as cluster:
        yield cluster


def attempts_by_step(run: Run) -> dict[int, set[int]]:
    """Return the attempts that logged each step."""
    lines = [m for m in _metric_lines(run) if "train/loss" in m]
    attempts: dict[int, set[int]] = {}
    for line in lines:
        attempts.setdefault(line["step"], set()).add(line["attempt"])
    return attempts


def _metric_lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.folder.read_text("metrics.jsonl").splitlines()]


def node_of_a_worker(cluster: Cluster) -> Any:
    """Return a removable node with a training worker."""
    nodes = [n for n in train_worker_nodes(cluster).values() if n is not cluster.head_node]
    assert nodes
    return nodes[0]


def test_a_run_grows_and_shrinks_with_the_cluster(
    pretrained: Run, cluster: Cluster, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = pretrain_config(
        tmp_path / "run",
        tiny_corpus,
        cluster={"num_workers": [1, 2], "resize_check_s": 1, "max_failures": 2},
    )
    run = Run(config.run.dir)
    with CommandDriver(cluster, config, tmp_path) as driver:
        first = add_node(cluster)
        driver.set_step_limit(13)
        driver.start()
        driver.wait_for_step(13)
        assert driver.num_workers() == 1
        second = add_node(cluster)
        driver.wait_for(lambda: len(train_worker_nodes(cluster)) == 2, "second worker")
        driver.set_step_limit(26)
        driver.wait_for_step(26)
        assert driver.num_workers() == 2
        lost = node_of_a_worker(cluster)
        assert pids_with_title(
            node_pids(cluster.head_node), "_QueueActor"
        )  # the progress queue survives the node
        cluster.remove_node(lost, allow_graceful=False)
        driver.set_step_limit(10**9)
        driver.wait_until_finished()
    assert run.manifest["world_size"] == 1
    assert run.manifest["attempt"] >= 3  # one more if Ray first counts on the node that is gone
    for node in {first, second} - {lost}:
        cluster.remove_node(node)
    assert_every_chunk_once(run)
    assert chunks_by_step(run) == chunks_by_step(pretrained)
    assert train_losses(run) == pytest.approx(train_losses(pretrained), abs=1e-4)
    names = {name for line in run.metrics() for name in line}
    assert "time/reshard_s" in names


def test_a_drained_node_is_left_in_time_and_no_step_is_repeated(
    pretrained: Run, cluster: Cluster, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = pretrain_config(
        tmp_path / "run",
        tiny_corpus,
        cluster={"num_workers": 2, "max_failures": 0, "max_preemptions": 1},
    )
    run = Run(config.run.dir)
    with CommandDriver(cluster, config, tmp_path) as driver:
        nodes = [add_node(cluster), add_node(cluster)]
        driver.set_step_limit(13)
        driver.start()
        driver.wait_for_step(13)
        ending = node_of_a_worker(cluster)
        deadline = time.time() + 60
        accepted, why = ray._raylet.GcsClient(address=cluster.address).drain_node(
            ending.node_id,
            autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            "a test",
            int(deadline * 1000),
        )
        assert accepted, why
        nodes.append(add_node(cluster))
        time.sleep(3)  # Ray Train polls every 0.5 s, the trainer checks every 2 s
        driver.set_step_limit(10**9)
        driver.wait_for(lambda: run.manifest["attempt"] == 2, "second attempt")
        assert time.time() < deadline
        assert ending not in train_worker_nodes(cluster).values()
        cluster.remove_node(ending, allow_graceful=False)
        driver.wait_until_finished()
    assert run.manifest["attempt"] == 2
    for node in nodes:
        if node is not ending:
            cluster.remove_node(node)
    attempts = attempts_by_step(run)
    assert sorted(attempts) == list(range(1, len(attempts) + 1))
    assert all(len(numbers) == 1 for numbers in attempts.values())  # none was trained twice
    resumed_at = min(step for step, numbers in attempts.items() if numbers == {2})
    assert 14 <= resumed_at <= 17  # not a multiple of checkpoint_every
    assert_every_chunk_once(run)
    assert train_losses(run) == pytest.approx(train_losses(pretrained), abs=1e-6)

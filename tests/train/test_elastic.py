"""Workers come and go with the nodes of a cluster; what is trained stays the same."""

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
from tests.train.audits import assert_every_chunk_once, chunks_by_step
from tests.train.cases import pretrain_config
from tests.train.clusters import (
    Driver,
    add_node,
    named,
    node_pids,
    started_cluster,
    train_workers,
)
from tests.train.test_resume import train_losses

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with started_cluster() as cluster:
        yield cluster


def attempts_by_step(run: Run) -> dict[int, set[int]]:
    """Which attempts logged a step's training."""
    lines = [m for m in _raw(run) if "train/loss" in m]
    found: dict[int, set[int]] = {}
    for line in lines:
        found.setdefault(line["step"], set()).add(line["attempt"])
    return found


def _raw(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.folder.read_text("metrics.jsonl").splitlines()]


def node_of_a_worker(cluster: Cluster) -> Any:
    """A node that may be removed and trains."""
    nodes = [n for n in train_workers(cluster).values() if n is not cluster.head_node]
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
    with Driver(cluster, config, tmp_path) as driver:
        first = add_node(cluster)
        driver.allow(13)
        driver.start()
        driver.wait_for_step(13)
        assert driver.num_workers() == 1
        second = add_node(cluster)
        driver.wait_for(lambda: len(train_workers(cluster)) == 2, "second worker")
        driver.allow(26)
        driver.wait_for_step(26)
        assert driver.num_workers() == 2
        lost = node_of_a_worker(cluster)
        assert named(node_pids(cluster.head_node), "_QueueActor")  # progress is not lost with it
        cluster.remove_node(lost, allow_graceful=False)
        driver.allow(10**9)
        driver.join()
    assert run.manifest["world_size"] == 1
    assert run.manifest["attempt"] >= 3  # one more if Ray first counts on the node that is gone
    for node in {first, second} - {lost}:
        cluster.remove_node(node)
    assert_every_chunk_once(run)
    assert chunks_by_step(run) == chunks_by_step(pretrained)
    assert train_losses(run) == pytest.approx(train_losses(pretrained), abs=1e-4)
    names = {name for line in run.metrics() for name in line}
    assert "time/reshard_s" in names


def test_an_announced_end_of_a_node_is_left_in_time_and_no_step_is_repeated(
    pretrained: Run, cluster: Cluster, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = pretrain_config(
        tmp_path / "run",
        tiny_corpus,
        cluster={"num_workers": 2, "max_failures": 0, "max_preemptions": 1},
    )
    run = Run(config.run.dir)
    with Driver(cluster, config, tmp_path) as driver:
        nodes = [add_node(cluster), add_node(cluster)]
        driver.allow(13)
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
        time.sleep(3)  # Ray Train polls every 0.5 s, the trainer asks every 2 s
        driver.allow(10**9)
        driver.wait_for(lambda: run.manifest["attempt"] == 2, "second attempt")
        assert time.time() < deadline
        assert ending not in train_workers(cluster).values()
        cluster.remove_node(ending, allow_graceful=False)
        driver.join()
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

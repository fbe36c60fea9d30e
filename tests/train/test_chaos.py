"""A run whose processes and nodes are killed at random moments ends with the same losses."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

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

pytestmark = [pytest.mark.ray]
NUM_STEPS = 60  # of the run that is repeated
NUM_NODES = 3  # beside the head


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with started_cluster() as cluster:
        for _ in range(NUM_NODES):
            add_node(cluster)
        yield cluster


class Chaos:
    """Kills parts of a run and counts them by kind."""

    def __init__(self, driver: CommandDriver, rng: random.Random) -> None:
        self.driver, self.cluster, self.rng = driver, driver.cluster, rng
        self.killed: dict[str, int] = {}

    def kill(self, kind: str) -> None:
        kill: dict[str, Callable[[], None]] = {
            "data worker": self.kill_data_worker,
            "train worker": self.kill_train_worker,
            "node": self.kill_node,
            "driver": self.restart_driver,
        }
        print(f"step {self.driver.last_step()}: {kind}")
        kill[kind]()
        self.killed[kind] = self.killed.get(kind, 0) + 1

    def kill_data_worker(self) -> None:
        """Kill a process that reads rows, found by its Ray task name."""
        readers: list[int] = []

        def reads() -> bool:
            readers[:] = self._readers()
            if not readers:  # the prefetch buffer is full
                self.driver.set_step_limit(max(self.step_limit, self.driver.last_step() + 2))
            return bool(readers)

        self.driver.wait_for(reads, "process that reads rows")
        self._kill_one(readers)

    def _readers(self) -> list[int]:
        pids = [pid for node in self.cluster.list_all_nodes() for pid in node_pids(node)]
        return pids_with_title(pids, "ray::MapBatches")

    def set_step_limit(self, step: int) -> None:
        self.step_limit = step
        self.driver.set_step_limit(step)

    def kill_train_worker(self) -> None:
        self.driver.wait_for(lambda: bool(train_worker_nodes(self.cluster)), "training worker")
        self._kill_one(list(train_worker_nodes(self.cluster)))

    def kill_node(self) -> None:
        """Remove a node, preferably with a training worker, and add a new one."""
        training = [n for n in train_worker_nodes(self.cluster).values() if n in self._removable()]
        lost = self.rng.choice(training or self._removable())
        self.cluster.remove_node(lost, allow_graceful=False)
        add_node(self.cluster)

    def restart_driver(self) -> None:
        self.driver.kill()
        self.driver.start()

    def _removable(self) -> list:
        return sorted(self.cluster.worker_nodes, key=lambda node: node.node_id)

    def _kill_one(self, pids: list[int]) -> None:
        assert pids
        os.kill(self.rng.choice(sorted(pids)), signal.SIGKILL)


def assert_survives(
    kills: list[str], seed: int, *, uninterrupted: Run, cluster: Cluster, corpus: Path, folder: Path
) -> None:
    """Train with the kills spread over the run; it must end as `uninterrupted` did."""
    rng = random.Random(seed)
    print(f"seed {seed}")
    config = pretrain_config(
        folder / "run",
        corpus,
        train={"checkpoint_every": 5},
        cluster={"num_workers": 2, "max_failures": -1},
    )
    run = Run(config.run.dir)
    with CommandDriver(cluster, config, folder) as driver:
        chaos = Chaos(driver, rng)
        driver.set_step_limit(0)
        driver.start()
        for number, kind in enumerate(kills):
            # each part of the run waits for its kill
            low, high = (NUM_STEPS * n // (len(kills) + 1) for n in (number, number + 1))
            chaos.set_step_limit(high)
            if rng.random() < 0.7:
                driver.wait_for_step(rng.randint(low + 1, high))
            else:  # perhaps while it restarts
                time.sleep(rng.uniform(0, 10))
            chaos.kill(kind)
        driver.set_step_limit(10**9)
        driver.wait_until_finished()
    assert sum(chaos.killed.values()) == len(kills)
    assert run.finished
    assert_every_chunk_once(run)
    assert chunks_by_step(run) == chunks_by_step(uninterrupted)
    assert len(train_losses(run)) == NUM_STEPS
    assert train_losses(run) == pytest.approx(train_losses(uninterrupted), abs=1e-6)
    print(f"{run.manifest['attempt']} attempts, killed {chaos.killed}")


@pytest.mark.timeout(600)
def test_a_run_survives_the_death_of_each_part(
    pretrained: Run, cluster: Cluster, tiny_corpus: Path, tmp_path: Path
) -> None:
    kinds = ["train worker", "data worker", "node", "driver"]
    assert_survives(
        kinds, 1, uninterrupted=pretrained, cluster=cluster, corpus=tiny_corpus, folder=tmp_path
    )


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_run_survives_twenty_deaths(
    pretrained: Run, cluster: Cluster, tiny_corpus: Path, tmp_path: Path
) -> None:
    seed = int(os.environ.get("MEDGPT_TEST_SEED", time.time()))
    kinds = ["train worker", "data worker", "node", "driver"] * 5
    last = kinds.pop()  # no data worker: the last rows are read some steps before they are trained
    random.Random(seed).shuffle(kinds)
    kinds.append(last)
    assert_survives(
        kinds, seed, uninterrupted=pretrained, cluster=cluster, corpus=tiny_corpus, folder=tmp_path
    )

"""A cluster of several raylets on this machine, and a driver process."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import psutil
import ray
from ray.cluster_utils import Cluster
from ray.experimental import internal_kv

from medgpt.config.stages import TrainStageConfig
from medgpt.runs import Run
from tests.train import worker_hooks
from tests.train.tiny_configs import write_toml

ROOT = Path(__file__).parents[2]
STORE_BYTES = 128 * 2**20
FAST_HEALTH_CHECKS = {  # Ray notices a lost node after about 5 s instead of 20
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
}
FAST_RAY_TRAIN_POLLS = {  # shorter polls, or tests would wait for them
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",  # the session's local Ray switches it off
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
}


@contextmanager
def started_cluster() -> Iterator[Cluster]:
    """Start a head node with one CPU, for drivers and controllers; it is never removed."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "include_dashboard": False,
            "object_store_memory": STORE_BYTES,
            "_system_config": FAST_HEALTH_CHECKS,
        },
    )
    try:
        yield cluster
    finally:
        cluster.shutdown()
        if ray.is_initialized():
            # the head replaced the key-value store of the Ray of this process
            internal_kv._initialize_internal_kv(ray._private.worker.global_worker.gcs_client)


def add_node(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)


def node_pids(node: Any) -> list[int]:
    """Return the ids of a node's raylet and all its child processes."""
    pids = []
    for kind, processes in node.all_processes.items():
        if kind == "raylet":
            for info in processes:
                raylet = psutil.Process(info.process.pid)
                pids += [raylet.pid, *(p.pid for p in raylet.children(recursive=True))]
    return pids


def pids_with_title(pids: list[int], name: str) -> list[int]:
    """Return the processes whose title, which Ray sets, contains `name`."""
    matching = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            if any(name in word for word in psutil.Process(pid).cmdline()):
                matching.append(pid)
    return matching


def train_worker_nodes(cluster: Cluster) -> dict[int, Any]:
    """Return the node of each training worker, by process id."""
    return {
        pid: node
        for node in cluster.list_all_nodes()
        for pid in pids_with_title(node_pids(node), "RayTrainWorker")
    }


class CommandDriver:
    """`medgpt pretrain` in its own process, paused at the step limit."""

    def __init__(self, cluster: Cluster, config: TrainStageConfig, folder: Path) -> None:
        self.cluster, self.run = cluster, Run(config.run.dir)
        self.step_limit_file, self.log = folder / "step_limit", folder / "driver.log"
        self.toml = write_toml(config, folder / "config.toml")
        self.set_step_limit(10**9)
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def set_step_limit(self, step: int) -> None:
        """Let the run log steps up to this one."""
        partial = self.step_limit_file.with_suffix(".new")
        partial.write_text(str(step))
        partial.replace(self.step_limit_file)

    def start(self) -> None:
        environment = {
            worker_hooks.STEP_LIMIT_FILE: str(self.step_limit_file),
            "PYTHONPATH": str(ROOT),
        }
        runtime_env = {
            "worker_process_setup_hook": "tests.train.worker_hooks.install",
            "env_vars": environment,
        }
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "medgpt", "pretrain", str(self.toml)],
                env={
                    **os.environ,
                    **FAST_RAY_TRAIN_POLLS,
                    "PYTHONPATH": str(ROOT),
                    "RAY_ADDRESS": self.cluster.address,
                    "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": runtime_env}),
                },
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait_until_finished(self, timeout_s: float = 300) -> None:
        """Wait for the end of the command, which must succeed."""
        assert self.process is not None
        code = self.process.wait(timeout_s)
        assert code == 0, self.log.read_text("utf-8")[-4000:]

    def last_step(self) -> int:
        return worker_hooks.last_logged_step(Path(self.run.folder.path("metrics.jsonl")))

    def wait_for(self, done: Callable[[], bool], what: str, timeout_s: float = 240) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text("utf-8")[-4000:]
            assert time.monotonic() < deadline, (
                f"no {what} after {timeout_s} s, step {self.last_step()}\n"
                + self.log.read_text("utf-8")[-4000:]
            )
            time.sleep(0.1)

    def wait_for_step(self, step: int, timeout_s: float = 240) -> None:
        self.wait_for(lambda: self.last_step() >= step, f"step {step}", timeout_s)

    def num_workers(self) -> int:
        """Return the number of workers of the newest attempt."""
        return int(self.run.manifest.get("world_size", 0))

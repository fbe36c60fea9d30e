"""PPO on a cluster that has no nodes until they are needed."""

import json
import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray._common.network_utils import find_free_port

from tests.rlhf.command import Command
from tests.rlhf.stages import Parts, write_config

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
MARK = "MEDGPT_TEST_CLUSTER"  # in the environment of all that the cluster starts
NODE_CPUS, MAX_NODES = 1, 3
STORE_BYTES = 128 * 2**20
EMPTY: dict[str, Any] = {  # what Ray wants to see of every definition
    **{name: {} for name in ("auth", "docker", "file_mounts")},
    **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
    **{name: [] for name in ("initialization_commands", "setup_commands", "head_setup_commands")},
    **{name: [] for name in ("worker_setup_commands", "head_start_ray_commands")},
    "worker_start_ray_commands": [],
    "file_mounts_sync_continuously": False,
}


def definition(address: str) -> dict:
    """Real raylets on this machine, by Ray's provider for tests."""
    node = {"CPU": NODE_CPUS, "object_store_memory": STORE_BYTES}
    return {
        "cluster_name": "test",
        "max_workers": MAX_NODES,
        "idle_timeout_minutes": 5,
        "upscaling_speed": 10,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": node, "node_config": {}, "max_workers": MAX_NODES},
        },
        **EMPTY,
    }


def processes(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            if process.environ().get(MARK) == mark:
                found.append(process)
    return found


@pytest.fixture
def growing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The way to a head without CPUs, whose autoscaler may add three nodes."""
    folder = tmp_path_factory.mktemp("ray")
    address = f"{ray.util.get_node_ip_address()}:{find_free_port()}"
    (folder / "cluster.yaml").write_text(json.dumps(definition(address)))
    command = [
        "ray", "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=0",
        f"--port={address.split(':')[1]}", f"--object-store-memory={STORE_BYTES}",
        "--include-dashboard=false", "--dashboard-agent-listen-port=0",
        f"--ray-client-server-port={find_free_port()}",
        f"--autoscaling-config={folder / 'cluster.yaml'}",
    ]  # fmt: skip
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    extra = {MARK: str(folder), "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(
            command,
            env={**os.environ, **extra, **token},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_for(head, folder / "head.log")
        yield {"RAY_ADDRESS": address, **token}
    finally:
        while left := processes(str(folder)):
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=5)
        head.wait()


def wait_for(head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while "Ray runtime started" not in log.read_text():
        assert head.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def test_ppo_waits_for_nodes_says_so_and_trains(
    growing: dict[str, str], parts: Parts, tmp_path: Path
) -> None:
    one = dict.fromkeys(("actor", "critic", "reward", "reference", "rollout"), 1)
    write_config(tmp_path, parts, "ppo.max_iterations=2", workers=one)
    with Command(tmp_path, cluster=growing) as command:
        command.start()
        command.join()
        print(command.said())
    assert "waiting up to 600 s" in command.said()
    assert command.run.finished
    assert command.step == 2
    assert command.run.manifest["hardware"]["cluster"]["CPU"] >= NODE_CPUS

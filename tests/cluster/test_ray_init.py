"""Ray is found or started, or the error names the reason at once."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import ray

from medgpt.cluster.ray_init import check_address, private_folder, start_with_retry
from medgpt.config.base import ConfigError

SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)"]


class SlowNode:
    """Fails like `ray.init` the first `failures` times and leaves a process each time."""

    def __init__(self, failures: int, message: str = "The current node timed out during startup."):
        self.failures, self.message = failures, message
        self.left_processes: list[psutil.Process] = []

    def __call__(self) -> None:
        if len(self.left_processes) < self.failures:
            self.left_processes.append(psutil.Process(subprocess.Popen(SLEEPER).pid))
            raise Exception(self.message)


@pytest.fixture
def shutdowns(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry per `ray.shutdown()`, which must not reach the Ray of the session."""
    calls: list[None] = []
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append(None))
    return calls


def test_a_timed_out_start_is_retried_once_after_killing_its_processes(
    shutdowns: list[None],
) -> None:
    node = SlowNode(failures=1)
    start_with_retry(node)
    assert len(shutdowns) == 1
    (leftover,) = node.left_processes
    assert not leftover.is_running()


def test_two_timed_out_starts_are_a_config_error(shutdowns: list[None]) -> None:
    node = SlowNode(failures=2)
    with pytest.raises(ConfigError, match=r"too busy; try again .* or set RAY_ADDRESS"):
        start_with_retry(node)
    assert len(node.left_processes) == len(shutdowns) == 2


def test_other_start_failures_are_not_retried(shutdowns: list[None]) -> None:
    node = SlowNode(failures=2, message="no space left on device")
    with pytest.raises(Exception, match="no space"):
        start_with_retry(node)
    assert not shutdowns
    (leftover,) = node.left_processes
    leftover.kill()


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_unreachable_ray_address_fails_at_once(scheme: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"^RAY_ADDRESS={address}: no cluster answers"):
            check_address(address)
        listener.listen()
        check_address(address)
    check_address("auto")


SPILLING = """
import json, sys
import numpy as np
import psutil
import ray
from medgpt.cluster import ray_init

ray_init.start_local(1, spill_dir=sys.argv[1])
kept = [ray.put(np.full(2**27, i, np.uint8)) for i in range(6)]  # of 128 MiB; the store has 512
assert ray.get(kept[0])[0] == 0
family = {p.pid for p in psutil.Process().children(recursive=True)} | {psutil.Process().pid}
ports = [c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.pid in family]
open_to = {c.laddr.ip.removeprefix("::ffff:") for c in ports}
print(json.dumps({"session": ray._private.worker._global_node.get_session_dir_path(),
                  "ips": sorted(open_to)}))
"""


@pytest.mark.ray
def test_a_local_ray_has_private_folders_and_local_ports(tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir(mode=0o755)
    environment = {**os.environ, "RAY_TMPDIR": "/tmp"}  # names of sockets must be short
    command = [sys.executable, "-c", SPILLING, str(volume)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    session = json.loads(result.stdout.splitlines()[-1])
    assert session["ips"] == ["127.0.0.1"]
    for folder in (Path(session["session"]).parents[1], *volume.iterdir()):
        assert folder.name == f"medgpt-{os.getuid()}"
        assert folder.stat().st_mode & 0o777 == 0o700


def test_a_private_folder_that_is_a_link_or_a_file_is_refused(tmp_path: Path) -> None:
    made = Path(private_folder(str(tmp_path)))
    assert made.stat().st_mode & 0o777 == 0o700
    made.chmod(0o755)
    private_folder(str(tmp_path))  # the folder is ours, so it becomes private again
    assert made.stat().st_mode & 0o777 == 0o700
    made.rmdir()
    made.symlink_to(tmp_path)
    with pytest.raises(ConfigError, match=r"is not a folder of your own; .* cluster\.spill_dir"):
        private_folder(str(tmp_path))

"""The cluster of clusters/local.yaml, run by its scripts beside other Ray clusters."""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import psutil

from tests.clusters.definitions import CLUSTERS, ROOT
from tests.jobs.ray_cluster import free_ports
from tests.train.local_cluster import FAST_HEALTH_CHECKS


class LocalCluster:
    """The local cluster with its own ports, folder and token."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="c", dir="/tmp"))  # socket paths must be short
        port, dashboard, client = free_ports(3)
        self.token = self.folder / "token" / "auth_token"
        binaries = Path(sys.executable).parent
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "PYTHONPATH": "",
            "MEDGPT_CLUSTER_DIR": str(self.folder),
            "MEDGPT_RAY_PORT": str(port),
            "MEDGPT_DASHBOARD_PORT": str(dashboard),
            "MEDGPT_CLIENT_PORT": str(client),
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            **{f"RAY_{key}": str(value) for key, value in FAST_HEALTH_CHECKS.items()},
        }
        self.port, self.url = port, f"http://127.0.0.1:{dashboard}"
        self.private = self.folder / "local"

    def __enter__(self) -> Self:
        self.said = self.script("up.sh").stdout
        return self

    def __exit__(self, *_: object) -> None:
        self.script("down.sh")

    def script(self, name: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["bash", str(CLUSTERS / name), "local"],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def start(self, command: str) -> subprocess.Popen[str]:
        """Start a shell command with the environment that up.sh prints."""
        return subprocess.Popen(
            ["bash", "-c", f"source {self.private}/env.sh; exec {command}"],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run_program(self, program: str) -> Any:
        """Run a Ray driver and return what it prints as JSON; `state` is imported."""
        begin = (
            "import json, ray; from ray._private.state import state\n"
            f"address = ray.util.get_node_ip_address() + ':{self.port}'\n"
            "ray.init(address, log_to_driver=False)\n"
        )
        process = self.start(f"python -c {shlex.quote(begin + program)}")
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out
        return json.loads(out.splitlines()[-1])

    def processes(self) -> list[psutil.Process]:
        processes = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("MEDGPT_LOCAL_CLUSTER") == str(self.private):
                    processes.append(process)
            except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return processes

    def num_raylets(self) -> int:
        return sum(_program_name(process).endswith("raylet/raylet") for process in self.processes())


def _program_name(process: psutil.Process) -> str:
    """Return the program of a process; an empty string if it has ended."""
    try:
        return "".join(process.cmdline()[:1])
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def wait_until(done: Callable[[], bool], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, f"not {what} after {timeout_s} s"
        time.sleep(0.5)

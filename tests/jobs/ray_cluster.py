"""A Ray cluster with a dashboard on this machine, and `medgpt` commands against it."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
PORTS = (
    "port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "ray-client-server-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)


class RayCluster:
    """A head node with its own ports, folder and token, beside other Ray clusters."""

    def __init__(self, folder: str, num_cpus: int, environment: Mapping[str, str]) -> None:
        binaries = Path(sys.executable).parent  # jobs run with the PATH of `ray start`
        self.folder = Path(folder)
        self.ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self.address = f"http://127.0.0.1:{self.ports['dashboard-port']}"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.environment = {
            **inherited,
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        ports = [f"--{name}={port}" for name, port in self.ports.items()]
        self.ray = str(binaries / "ray")
        start = [self.ray, "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
        self.head = subprocess.Popen(
            [*start, f"--num-cpus={num_cpus}", f"--temp-dir={folder}", *ports],
            env={**self.environment, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._wait_for_port(self.ports["dashboard-port"])

    def _wait_for_port(self, port: int) -> None:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            assert self.head.poll() is None, "ray start ended"
            time.sleep(0.3)
        raise TimeoutError(f"no dashboard on port {port}")

    def ray_submit(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command as a plain Ray job until it ends; return its output."""
        submit = [self.ray, "job", "submit", "--address", self.address, "--working-dir", "."]
        return self._run([*submit, "--", *command], ROOT, {})

    def medgpt(
        self, *arguments: str, folder: Path = ROOT, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `medgpt submit` or `medgpt job` in `folder`."""
        return self._run(self.command(*arguments), folder, environment)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "medgpt", *arguments, "--address", self.address]

    def _run(
        self, command: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
        )

    def processes(self, *words: str) -> list[psutil.Process]:
        """Return the processes of the cluster with all these words in their command."""
        processes = []
        for process in psutil.Process(self.head.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if set(words) <= set(process.cmdline()):
                    processes.append(process)
        return processes

    def stop(self) -> None:
        """Stop the processes of the head, and no others."""
        head = psutil.Process(self.head.pid)
        for process in [head, *head.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.head.wait()


@contextmanager
def running_cluster(*, num_cpus: int = 3, **environment: str) -> Iterator[RayCluster]:
    """Run a cluster of one node with this environment."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # socket paths must be short
    cluster = RayCluster(folder, num_cpus, environment)
    try:
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports

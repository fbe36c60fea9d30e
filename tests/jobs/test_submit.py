"""A stage submitted with plain `ray job submit` leaves its run where it was told to."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from transformers import AutoModelForCausalLM

from medgpt.runs import Run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]
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


class Cluster:
    """A head node of its own: own ports, own folder, own token; others' Rays are left alone."""

    def __init__(self, folder: str) -> None:
        binaries = Path(sys.executable).parent  # jobs run with the PATH of `ray start`
        ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self.address = f"http://127.0.0.1:{ports['dashboard-port']}"
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        options = [f"--{name}={port}" for name, port in ports.items()]
        self.ray = str(binaries / "ray")
        self.head = subprocess.Popen(
            [
                self.ray,
                "start",
                "--head",
                "--block",
                "--num-cpus=3",
                f"--temp-dir={folder}",
                *options,
            ],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._await_port(ports["dashboard-port"])

    def _await_port(self, port: int) -> None:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            assert self.head.poll() is None, "ray start ended"
            time.sleep(0.3)
        raise TimeoutError(f"no dashboard on port {port}")

    def submit(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command as a job; returns when it has ended, with its output."""
        submit = [self.ray, "job", "submit", "--address", self.address, "--working-dir", "."]
        return subprocess.run(
            [*submit, "--", *command],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
        )

    def stop(self) -> None:
        """End the head's processes, and only those."""
        head = psutil.Process(self.head.pid)
        for process in [head, *head.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.head.wait()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # socket paths must be short
    cluster = Cluster(folder)
    yield cluster
    cluster.stop()
    shutil.rmtree(folder, ignore_errors=True)


def test_a_submitted_job_leaves_its_run_in_the_absolute_run_directory(
    cluster: Cluster, base: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    job = cluster.submit(
        *["medgpt", "sft", "configs/debug/sft.toml", f"run.dir={tmp_path}/run"],
        *[f"model.name={base}", f'data.sources.0.paths=["{tiny_corpus}/sft"]'],
        *["train.max_steps=3", "train.epochs=1", "report.prompts=[]"],
    )
    assert job.returncode == 0, job.stdout + job.stderr
    assert "succeeded" in job.stdout
    run = Run(f"{tmp_path}/run")
    assert run.finished
    assert run.metrics()[-1]["step"] == 3
    AutoModelForCausalLM.from_pretrained(run.model.url)


def test_a_relative_run_directory_is_refused_in_a_job(cluster: Cluster) -> None:
    job = cluster.submit("medgpt", "sft", "configs/debug/sft.toml", "train.max_steps=3")
    assert job.returncode != 0
    assert (
        "run.dir='runs/debug/sft': a submitted job needs an absolute path or URI, its working "
        "directory is a cached copy" in job.stdout
    )

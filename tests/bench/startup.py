"""Seconds from the command `medgpt sft` to its first optimizer step.

`python -m tests.bench.startup` times it with no Ray running, and on a warm local cluster, which it
starts for itself: one such command ran there before. The data is tokenised anew each time.
"""

import argparse
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

from tests.bench import common

POLL_S = 0.05
PORTS = (
    "port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "ray-client-server-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)


def to_first_step(args: argparse.Namespace, env: dict[str, str]) -> float:
    """Return the seconds to the first step; the command then runs to its end."""
    run = args.dir / "startup"
    return first_step(one_step(args, run), run, env)


def one_step(args: argparse.Namespace, run: Path) -> list[str]:
    """Return the command that fine-tunes for one step, from raw rows, in a new run."""
    data, base = common.workload(args.dir, args.size)
    shutil.rmtree(run, ignore_errors=True)
    keys = {"train.max_steps": 1, "train.global_batch_size": 8, "train.micro_batch_size": 4}
    return common.medgpt_sft(data, base, run, **keys)


def first_step(
    command: Sequence[str], run: Path, env: Mapping[str, str], folder: Path | None = None
) -> float:
    """Seconds from the start of `command` in `folder` to the first step of `run`.

    Raises:
        RuntimeError: it failed, with the end of what it said.
    """
    log = run.with_suffix(".log")
    began, seconds = time.monotonic(), 0.0
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=common.environment(**env),
        )
        while process.poll() is None:
            time.sleep(POLL_S)
            if not seconds and common.read_steps(run / "metrics.jsonl"):
                seconds = time.monotonic() - began
    if process.returncode or not seconds:
        raise RuntimeError(log.read_text()[-3000:])
    return seconds


@contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """Yield the environment of commands that run on a separate local cluster."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        sockets = [socket.socket() for _ in PORTS]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        ports = dict(zip(PORTS, (opened.getsockname()[1] for opened in sockets), strict=True))
        for opened in sockets:
            opened.close()
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        options = [f"--{name}={port}" for name, port in ports.items()]
        options += ["--include-dashboard=false", f"--temp-dir={folder}", "--num-cpus=3"]
        ray = [sys.executable, "-m", "ray.scripts.scripts"]
        head = subprocess.Popen(
            [*ray, "start", "--head", "--block", "--node-ip-address=127.0.0.1", *options],
            env=common.environment(**token),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _wait_for_port(ports["port"])
            yield {**token, "RAY_ADDRESS": f"127.0.0.1:{ports['port']}"}
        finally:
            for process in [*psutil.Process(head.pid).children(recursive=True), head]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            head.wait()


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                time.sleep(5)  # until the node has registered
                return
        time.sleep(0.2)
    raise TimeoutError(f"no Ray on port {port}")


def main() -> None:
    args = common.options(__doc__, rounds=5).parse_args()
    fresh = [to_first_step(args, {}) for _ in range(args.rounds)]
    print(f"medgpt sft, no Ray running: first step after {common.spread(fresh, '.1f')} s")
    with cluster() as env:
        to_first_step(args, env)
        warm = [to_first_step(args, env) for _ in range(args.rounds)]
    print(f"medgpt sft, warm local cluster: first step after {common.spread(warm, '.1f')} s")


if __name__ == "__main__":
    main()

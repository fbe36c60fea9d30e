"""Runs `medgpt ppo` as a subprocess whose workers can be held and killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Self

import ray

from medgpt.runs import Run
from tests.rlhf import hooks
from tests.rlhf.hooks import Hold
from tests.train.worker_hooks import last_logged_step

ROOT = Path(__file__).parents[2]


class Command:
    """The command with config FOLDER/ppo.toml and run directory FOLDER/run.

    Args:
        cluster: environment variables that point to a cluster; by default this process's Ray.
    """

    def __init__(self, folder: Path, *, cluster: dict[str, str] | None = None) -> None:
        self.folder, self.run, self.log = folder, Run(str(folder / "run")), folder / "command.log"
        self.cluster = cluster or {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        self.process: subprocess.Popen[bytes] | None = None
        self.holds = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def start(self) -> None:
        """Start or repeat the command."""
        environment = {hooks.FOLDER_VARIABLE: str(self.folder), "PYTHONPATH": str(ROOT)}
        runtime_env = {
            "worker_process_setup_hook": "tests.rlhf.hooks.install",
            "env_vars": environment,
        }
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "medgpt", "ppo", str(self.folder / "ppo.toml")],
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    **self.cluster,
                    "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": runtime_env}),
                },
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def hold_worker(self, where: Hold) -> None:
        """Hold a worker at this place and release the one held now."""
        self.holds += 1
        hooks.write_hold(self.folder, replace(where, number=self.holds))

    def wait_until_held(self) -> int:
        """Return the process id of the held worker."""
        self.wait_for(lambda: self._held_pid() is not None, "worker in the phase")
        held = self._held_pid()
        assert held is not None
        return held

    def _held_pid(self) -> int | None:
        path = self.folder / hooks.HELD_FILE
        held = json.loads(path.read_text()) if path.exists() else {"number": 0}
        return held["pid"] if held["number"] == self.holds else None

    def release(self) -> None:
        hooks.write_hold(self.folder, None)

    def pid_of(self, role: str, rank: int) -> int:
        """Return the process id of the latest worker of this role and rank."""
        return int(hooks.pid_file(self.folder, role, rank).read_text())

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def join(self, timeout_s: float = 240) -> None:
        """Wait for the command to exit with status 0."""
        assert self.process is not None
        code = self.process.wait(timeout_s)
        assert code == 0, self.output()[-4000:]

    @property
    def step(self) -> int:
        """The latest logged step."""
        return last_logged_step(self.folder / "run" / "metrics.jsonl")

    def output(self) -> str:
        return self.log.read_text("utf-8")

    def wait_for(self, done: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
        assert self.process is not None
        deadline = time.monotonic() + timeout_s
        while not done():
            assert self.process.poll() is None, f"no {what}\n{self.output()[-4000:]}"
            assert time.monotonic() < deadline, f"no {what}\n{self.output()[-4000:]}"
            time.sleep(0.05)

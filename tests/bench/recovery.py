"""Seconds from the death of a node to the next finished step of `medgpt sft`, beside a cold start.

    python -m tests.bench.recovery

The nodes are raylets on this machine. In each round the command starts on the warm cluster, up to
its first finished step: the cold start. A node with a training worker is then killed while another
one waits to take its place; the clock stops when a new attempt has finished a step. It resumes from
a checkpoint and does again what came after it.
"""

import argparse
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from tests.bench import common
from tests.train.local_cluster import add_node, node_pids, started_cluster, train_worker_nodes

POLL_S = 0.05
PATIENCE_S = 300
NODES = 3  # with a CPU each, as the head: two workers, a data task, and one to spare
CHECKPOINT_EVERY, KILL_AT = 5, 7  # steps


class TrainingRun:
    """The command on a cluster, in a new run directory."""

    def __init__(self, cluster: Cluster, args: argparse.Namespace) -> None:
        self.run = args.dir / "recovery"
        self.log = self.run.with_suffix(".log")
        data, base = common.workload(args.dir, args.size)
        shutil.rmtree(self.run, ignore_errors=True)
        keys = {"global_batch_size": 8, "micro_batch_size": 4, "checkpoint_every": CHECKPOINT_EVERY}
        changes = {f"train.{key}": value for key, value in keys.items()}
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                common.medgpt_sft(data, base, self.run, **changes),
                stdout=output,
                stderr=subprocess.STDOUT,
                env=common.environment(RAY_ADDRESS=cluster.address),
                start_new_session=True,
            )

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def seconds_until(self, done: Callable[[], bool]) -> float:
        """Raise RuntimeError with the output if the command ended or took too long."""
        began = time.monotonic()
        while not done():
            waited = time.monotonic() - began
            if self.process.poll() is not None or waited > PATIENCE_S:
                raise RuntimeError(f"after {waited:.0f} s\n{self.log.read_text()[-3000:]}")
            time.sleep(POLL_S)
        return time.monotonic() - began

    def step(self) -> int:
        """Return the last finished step."""
        return max(self._steps(), default=0)

    def attempt(self) -> int:
        """Return the newest attempt that has finished a step."""
        return max((int(line["attempt"]) for line in self._steps().values()), default=0)

    def _steps(self) -> dict[int, dict[str, float]]:
        return common.read_steps(self.run / "metrics.jsonl")


def cold_start_and_recovery(cluster: Cluster, args: argparse.Namespace) -> tuple[float, float]:
    """Return the seconds of both."""
    training = TrainingRun(cluster, args)
    try:
        cold = training.seconds_until(lambda: training.step() > 0)
        training.seconds_until(lambda: training.step() >= KILL_AT)
        lost, before = node_of_a_worker(cluster), training.attempt()
        for pid in node_pids(lost):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        recovery = training.seconds_until(lambda: training.attempt() > before)
    finally:
        training.end()
    cluster.remove_node(lost, allow_graceful=False)
    add_node(cluster)
    wait_until_idle(cluster)
    return cold, recovery


def node_of_a_worker(cluster: Cluster) -> Any:
    return next(n for n in train_worker_nodes(cluster).values() if n is not cluster.head_node)


def wait_until_idle(cluster: Cluster) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while train_worker_nodes(cluster):
        if time.monotonic() > deadline:
            raise TimeoutError("workers of the round before do not end")
        time.sleep(POLL_S)


def main() -> None:
    parser = common.options(__doc__, rounds=5)
    parser.set_defaults(dir=Path("runs/bench/recovery"))
    args = parser.parse_args()
    with started_cluster() as cluster:
        for _ in range(NODES):
            add_node(cluster)
        cold_start_and_recovery(cluster, args)  # files are cached from now on
        colds, recoveries = [], []
        for _ in range(args.rounds):
            cold, recovery = cold_start_and_recovery(cluster, args)
            print(f"  cold start {cold:.1f} s, recovery {recovery:.1f} s", flush=True)
            colds.append(cold)
            recoveries.append(recovery)
    ratios = [recovery / cold for cold, recovery in zip(colds, recoveries, strict=True)]
    print(f"from the command to its first step: {common.spread(colds, '.1f')} s")
    print(f"from the kill to the next step: {common.spread(recoveries, '.1f')} s")
    print(f"the second / the first: {common.spread(ratios)}")


if __name__ == "__main__":
    main()

"""Seconds that a run needs to go on after it lost a node, beside those of its start.

    python -m tests.bench.recovery

Three raylets of one CPU beside the head, two of them train. The raylet of one and all its
processes are killed at once; the time is that until a step that had not been done before.
"""

import json
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

from ray.cluster_utils import Cluster

from medgpt.data.sample.render import Corpus
from tests.bench import common
from tests.train.cases import pretrain_config
from tests.train.clusters import Driver, add_node, node_pids, started_cluster, train_workers

LIMIT = 1.5
NODES = 3
WARM_STEP = 20  # after which the node is lost


def write_corpus(folder: Path) -> None:
    (folder / "pretrain").mkdir(parents=True, exist_ok=True)
    rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in Corpus().pretraining()]
    (folder / "pretrain/0.jsonl").write_text("".join(rows), "utf-8")


def start_and_recover(cluster: Cluster, folder: Path, corpus: Path) -> tuple[float, float]:
    """(seconds to the first step, seconds from the death of a node to a new step)"""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    train = {"epochs": 100, "checkpoint_every": 5, "eval_every": 10**6, "audit": False}
    with Driver(cluster, pretrain_config(folder / "run", corpus, train=train), folder) as driver:
        began = time.monotonic()
        driver.start()
        driver.wait_for_step(1)
        cold = time.monotonic() - began
        driver.wait_for_step(WARM_STEP)
        training = list(train_workers(cluster).values())
        began = time.monotonic()
        for pid in node_pids(training[0]):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        done = driver.step()
        driver.wait_for_step(done + 1)
        recovered = time.monotonic() - began
        cluster.remove_node(training[0], allow_graceful=False)
        add_node(cluster)
    return cold, recovered


def main() -> None:
    args = common.options(__doc__, rounds=4).parse_args()
    folder = args.dir.absolute() / "recovery"
    write_corpus(folder / "corpus")
    cold, recovered = [], []
    with started_cluster() as cluster:
        for _ in range(NODES):
            add_node(cluster)
        for number in range(args.rounds):
            first, again = start_and_recover(cluster, folder / "case", folder / "corpus")
            print(
                f"  start {first:.1f} s, recovery {again:.1f} s, load {os.getloadavg()[0]:.1f}"
                f"{' (not counted: the first has cold caches)' if number == 0 else ''}",
                flush=True,
            )
            if number:
                cold.append(first)
                recovered.append(again)
    print(f"first step after {common.spread(cold, '.1f')} s")
    print(f"from the death of a node to the next new step {common.spread(recovered, '.1f')} s")
    told = common.spread(common.ratios(recovered, cold))
    print(f"recovery / start: {told}, at most {LIMIT} is wanted")


if __name__ == "__main__":
    main()

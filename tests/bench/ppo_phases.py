"""Overhead of a PPO iteration over the critical path of its phases, each measured alone.

`python -m tests.bench.ppo_phases` starts the pools of the benchmark, times every call of an
iteration while all other workers are idle, and compares the critical path with iterations of a run.
What several pools do at the same time takes as long as the longest, or as its sum on all cores.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray

from medgpt.cluster import ray_init
from medgpt.config.loading import load
from medgpt.config.ppo import PPOStageConfig
from medgpt.metrics import ConsoleReporter
from medgpt.rlhf.experience import RunningStats
from medgpt.rlhf.pools.pools import Pools
from medgpt.rlhf.roles.actor import Actor
from medgpt.rlhf.roles.common import UpdateTask
from medgpt.rlhf.roles.critic import Critic
from medgpt.rlhf.roles.reference import Reference
from medgpt.rlhf.roles.reward import Reward
from medgpt.rlhf.roles.rollout import Rollout
from medgpt.rlhf.rollout_batch import Prompts, Ragged
from medgpt.rlhf.setup import build_pools
from medgpt.rlhf.weight_sync.sync import WeightSync
from tests.bench import common, ppo

REPEATS = 5


class TimedPools:
    """Times calls that run alone."""

    def __init__(self, pools: Pools) -> None:
        self.pools = pools
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, name: str, call: Callable[[], Any]) -> Any:
        began = time.monotonic()
        result = call()
        if isinstance(result, list):
            self.pools.wait(result, name)
        self.seconds.setdefault(name, []).append(time.monotonic() - began)
        return result

    def medians(self) -> dict[str, float]:
        """Return the median times without the first calls, which warm up."""
        return {name: statistics.median(times[1:]) for name, times in self.seconds.items()}


def measure(config: PPOStageConfig, ids: list[list[int]]) -> dict[str, float]:
    """Return the seconds of each call of an iteration, run alone."""
    ray_init.init_ray(config.cluster)
    pools = build_pools(config, REPEATS, ConsoleReporter("ppo"))
    try:
        pools.start()
        result = pools.pools
        sync = WeightSync(result["actor"], result["rollout"], pools, config.pools.sync)
        prompts = Prompts(
            sample_ids=[str(i) for i in range(len(ids))],
            ids=Ragged.from_rows(ids, np.int32),
            messages=[json.dumps([["user", "-"]])] * len(ids),
        )
        timed = TimedPools(pools)
        for version in range(REPEATS):
            _iterate(timed, sync, ray.put(prompts), version)
    finally:
        pools.close()
    return timed.medians()


def _iterate(timed: TimedPools, sync: WeightSync, prompts: Any, version: int) -> None:
    pools = timed.pools.pools
    timed("sync", lambda: sync.run(version))
    rollouts = timed("generate", lambda: pools["rollout"].call(Rollout.generate, prompts, version))
    calls: dict[str, Callable[[], list[Any]]] = {
        "reward": lambda: pools["reward"].call(Reward.score, prompts, *rollouts),
        "values": lambda: pools["critic"].call(Critic.values, *rollouts),
        "logprobs": lambda: pools["actor"].call(Actor.logprobs, *rollouts),
        "reference": lambda: pools["reference"].call(Reference.logprobs, 1.0, *rollouts),
    }
    inputs = [rollouts, *(timed(name, call) for name, call in calls.items())]
    task = UpdateTask(
        iteration=0,
        weight_version=version,
        kl_coef=0.05,
        score_stats=RunningStats(),
        update_actor=True,
    )
    timed("fit critic", lambda: pools["critic"].call(Critic.update, task, *inputs))
    timed("update actor", lambda: pools["actor"].call(Actor.update, task, *inputs))


def critical_path(config: PPOStageConfig, alone: Mapping[str, float]) -> float:
    """Return the seconds of the phases in sequence, with the pools of a phase in parallel."""
    pools, cores = config.pools, os.cpu_count() or 1
    workers = {
        "reward": pools.reward.num_workers,
        "values": pools.critic.num_workers,
        "logprobs": pools.actor.num_workers,
        "reference": pools.reference.num_workers,
        "fit critic": pools.critic.num_workers,
        "update actor": pools.actor.num_workers,
    }
    path = alone["sync"] + alone["generate"]
    for phase in (["reward", "values", "logprobs", "reference"], ["fit critic", "update actor"]):
        work = sum(alone[name] * min(workers[name], cores) for name in phase)
        path += max(work / cores, *(alone[name] for name in phase))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("runs/bench"))
    parser.add_argument("--case", type=ppo.Case.parse, default=ppo.CASES[0], metavar="MODEL:P:T")
    args = parser.parse_args()
    os.environ |= common.THREADS
    ppo.medgpt(args, args.case)
    lines = common.read_steps(args.dir / "medgpt-ppo" / "metrics.jsonl", "time/iteration_s")
    iteration = [line["time/iteration_s"] for step, line in lines.items() if step > ppo.FIRST]
    config = load(PPOStageConfig, args.dir / "medgpt-ppo.toml", [])
    ids = json.loads(ppo.workload(args.dir, args.case).ids.read_text())[: ppo.BATCH]
    alone = measure(config, ids)
    path = critical_path(config, alone)
    print(", ".join(f"{name} {seconds:.3f} s" for name, seconds in alone.items()))
    ratios = [seconds / path for seconds in iteration]
    print(f"{args.case}, iteration / critical path: {common.spread(ratios, unit='iterations')}")


if __name__ == "__main__":
    main()

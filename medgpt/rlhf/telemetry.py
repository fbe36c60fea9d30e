"""Best-effort extras per iteration: speed, memory, samples. Dead pools surface at the next call."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from medgpt.rlhf.pools.pools import DataLost, PoolDied, Pools
from medgpt.rlhf.pools.worker import Usage
from medgpt.rlhf.roles.reward import Reward
from medgpt.runs import Run

SAMPLES_FILE = "rollouts.json"


def usage_metrics(
    pools: Pools, rollout_usage: Sequence[Any], num_tokens: float
) -> dict[str, float]:
    """Return the resident memory of the largest workers and the rollout tokens per second.

    Args:
        rollout_usage: refs of the rollout workers' Usage; empty if another attempt sampled.
    """
    others = (pool for pool in pools.pools.values() if pool.role != "rollout")
    refs: dict[str, Sequence[Any]] = {pool.role: pool.usage() for pool in others if pool.workers}
    if rollout_usage:
        refs["rollout"] = rollout_usage
    metrics: dict[str, float] = {}
    with suppress(PoolDied, DataLost):
        for role, role_refs in refs.items():
            used: list[Usage] = pools.get(role_refs, "usage")
            metrics[f"memory/{role}_rss_gb"] = max(u.rss_gb for u in used)
            if role == "rollout":
                metrics["rollout/tokens_per_s"] = num_tokens / max(u.call_s for u in used)
        metrics["memory/rss_gb"] = max(n for name, n in metrics.items() if "rss" in name)
    return metrics


def save_report_samples(pools: Pools, run: Run, *, step: int, count: int) -> None:
    """Save `count` of the latest rollouts for the report."""
    folder = run.folder
    earlier = folder.read_json(SAMPLES_FILE) if folder.exists(SAMPLES_FILE) else []
    refs, latest = pools.pools["reward"].call(Reward.report_samples, count), []
    with suppress(PoolDied, DataLost):
        latest = [{"iteration": step, **sample} for sample in pools.get(refs, "samples")[0]]
    folder.write_json(SAMPLES_FILE, [s for s in earlier if s["iteration"] < step] + latest)

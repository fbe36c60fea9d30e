"""Logging of a PPO run: metrics and their history, audit, phase times, samples for the report."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from medgpt.config.ppo import PPOStageConfig
from medgpt.metrics import MetricsWriter
from medgpt.rlhf.pools.pools import DataLost, PoolDied, Pools
from medgpt.rlhf.pools.worker import Usage
from medgpt.rlhf.roles.reward import Reward
from medgpt.runs import Run
from medgpt.train.audit import Audit

SAMPLES_FILE = "rollouts.json"


class RunLog:
    """Metrics, their history, and the audit of a run; each attempt opens new writers."""

    def __init__(self, run: Run) -> None:
        self.run, self.attempt = run, 0
        self.history: list[dict[str, float]] = []
        self._writer: MetricsWriter | None = None

    @property
    def is_open(self) -> bool:
        return self._writer is not None

    @property
    def writer(self) -> MetricsWriter:
        assert self._writer is not None, "no attempt has started"
        return self._writer

    def start_attempt(self, iteration: int, time_s: float) -> None:
        """Continue after `iteration`, which ended at `time_s` seconds of training."""
        self.close()
        self.attempt = self.run.manifest["attempt"] + 1
        self.run.update_manifest(attempt=self.attempt)
        self._writer = MetricsWriter(self.run, attempt=self.attempt, time_s=time_s)
        self._audit = Audit(self.run.folder / "audit", attempt=self.attempt, rank=0)
        self.history = [
            {name: value for name, value in line.items() if name not in ("time_s", "attempt")}
            for line in self.run.metrics()
            if line["step"] <= iteration
        ]

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of a step; they replace earlier ones of the step in the history."""
        self.writer.log(step, metrics)
        if self.history and self.history[-1]["step"] == step:
            self.history.pop()
        self.history.append({"step": step, **metrics})

    def metrics_of(self, step: int) -> dict[str, float]:
        """Return the metrics logged for the latest step, if it is `step`."""
        has_line = bool(self.history) and self.history[-1]["step"] == step
        return self.history[-1] if has_line else {"step": step}

    def write_audit(self, epoch: int, iteration: int, sample_ids: Iterable[str]) -> None:
        """Record the samples that an iteration trained on."""
        self._audit.add_chunks(epoch, iteration, ((sample_id, 0) for sample_id in sample_ids))
        self._audit.write(self._audit.take_lines())

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class PhaseTimer:
    """Measures an iteration and its phases in seconds."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.seconds: dict[str, float] = {}

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.began

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

    def metrics(self, num_samples: int) -> dict[str, float]:
        elapsed_s = self.elapsed_s
        return {
            "ppo/samples_per_s": num_samples / elapsed_s,
            "time/iteration_s": elapsed_s,
            "time/wait_s": elapsed_s - sum(self.seconds.values()),
            **{f"time/{phase}_s": seconds for phase, seconds in self.seconds.items()},
        }


def usage_metrics(
    pools: Pools, rollout_usage: Sequence[Any], num_tokens: float
) -> dict[str, float]:
    """Return the resident memory of the largest workers and the rollout tokens per second. If a
    pool is dead, some are missing; it surfaces at the next call.

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


def save_report_samples(pools: Pools, run: Run, config: PPOStageConfig, *, step: int) -> None:
    """Save some of the latest rollouts for the report, unless a source is sensitive."""
    if not config.report.samples or any(source.sensitive for source in config.data.sources):
        return
    folder = run.folder
    earlier = folder.read_json(SAMPLES_FILE) if folder.exists(SAMPLES_FILE) else []
    refs = pools.pools["reward"].call(Reward.report_samples, config.report.samples)
    latest = []
    with suppress(PoolDied, DataLost):
        latest = [{"iteration": step, **sample} for sample in pools.get(refs, "samples")[0]]
    folder.write_json(SAMPLES_FILE, [s for s in earlier if s["iteration"] < step] + latest)

"""Messages from the workers to the driver while they train, and their display.

Rank 0 puts `AttemptStarted` at the start of every attempt, `StepReport` after every step, and lines
to print into the queue. Any rank puts a ConfigError that ends the run. The driver puts None last.
"""

import time
from dataclasses import dataclass
from queue import Empty
from typing import TYPE_CHECKING, Any

import ray

from medgpt.config.base import ConfigError
from medgpt.metrics import ConsoleReporter

if TYPE_CHECKING:
    from ray.util.queue import Queue

FIRST_STEP_S = 60
POLL_S = 2.0
FACTS = (  # label, metric, format
    ("loss", "train/loss", ".3f"),
    ("validation", "validation/loss", ".3f"),
    ("tokens/s", "train/tokens_per_s", ",.0f"),
)


@dataclass(frozen=True, kw_only=True)
class AttemptStarted:
    """All workers have started and continue after `step`."""

    attempt: int  # from 1, over all starts of the run
    step: int
    num_workers: int


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Metrics of step `step` of `num_steps`, or of the validation after it."""

    step: int
    num_steps: int
    metrics: dict[str, float]


class AsyncQueue:
    """Wraps Ray's queue so that `put` does not wait for delivery."""

    def __init__(self, queue: "Queue") -> None:
        self.queue = queue
        self.latest: ray.ObjectRef | None = None

    def put(self, item: Any) -> None:
        self.flush()
        actor: Any = self.queue.actor
        self.latest = actor.put_nowait.remote(item)

    def flush(self) -> None:
        """Wait until the latest message has arrived. Raises Ray's error if it was lost."""
        if self.latest is not None:
            ray.get(self.latest)


class ProgressDisplay:
    """Shows the workers' messages and collects their ConfigErrors in `errors`."""

    def __init__(self, reporter: ConsoleReporter, *, log_every: int) -> None:
        self.reporter, self.log_every = reporter, log_every
        self.errors: list[ConfigError] = []
        self.latest: dict[str, float] = {}
        self.starts = 0
        self.started_at: float | None = None  # None after the first step or a warning

    def follow(self, messages: "Queue") -> None:
        """Show messages until one is None."""
        while True:
            try:
                message = messages.get(timeout=POLL_S)
            except Empty:
                self._warn_if_stalled(time.monotonic())
                continue
            if message is None:
                return
            self.show(message)

    def show(self, message: object) -> None:
        match message:
            case ConfigError():
                self.errors.append(message)
            case AttemptStarted():
                self._show_attempt(message)
            case StepReport():
                self._show_step(message)
            case str():
                self.reporter.say(message)
            case _:
                raise AssertionError(f"unknown message {type(message).__name__}")

    def _show_attempt(self, start: AttemptStarted) -> None:
        """Print a line for every attempt but the first of the run."""
        self.starts += 1
        self.started_at = time.monotonic()
        if start.attempt > 1:
            why = "workers were lost or replaced; " if self.starts > 1 else ""
            workers = f"{start.num_workers} worker{'s' if start.num_workers > 1 else ''}"
            position = f"continues after step {start.step}" if start.step else "begins again"
            self.reporter.say(f"{why}attempt {start.attempt} {position}, with {workers}")

    def _warn_if_stalled(self, now: float) -> None:
        """Warn if no step is done: workers may hold all CPUs that a lost node has left."""
        if self.started_at is not None and now - self.started_at > FIRST_STEP_S:
            self.started_at = None
            self.reporter.say(
                f"no step {FIRST_STEP_S} s after the workers started; do data tasks wait for "
                "a free CPU (cluster.data_cpus)?"
            )

    def _show_step(self, report: StepReport) -> None:
        if "train/loss" in report.metrics:
            self.started_at = None
        self.latest |= report.metrics
        facts = "  ".join(
            f"{label} {self.latest[name]:{form}}"
            for label, name, form in FACTS
            if name in self.latest
        )
        is_due = report.step % self.log_every == 0 or report.step == report.num_steps
        self.reporter.advance(
            "training",
            report.step,
            report.num_steps,
            facts,
            print_line=is_due and "train/loss" in report.metrics,
        )

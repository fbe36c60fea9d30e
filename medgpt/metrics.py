"""Report metrics to metrics.jsonl, TensorBoard and the console.

Metric names are `area/name`. Patient text must never be reported.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore  # generated code
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore  # generated code
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from medgpt.runs import Run


class MetricsWriter:
    """Appends to a run's metrics.jsonl and TensorBoard log. Only one process of a run may write."""

    def __init__(self, run: Run, *, attempt: int, time_s: float) -> None:
        """`time_s` is the training time in seconds of the steps that earlier attempts completed."""
        self.run, self.attempt = run, attempt
        self.started_at = time.monotonic() - time_s
        local = run.folder.is_local
        self.scratch = None if local else tempfile.TemporaryDirectory(prefix="medgpt-")
        root = Path(run.folder.root if local else self.scratch.name)  # type: ignore[union-attr]
        self.file = root / "metrics.jsonl"
        if not local and run.folder.exists("metrics.jsonl"):
            self.file.write_text(run.folder.read_text("metrics.jsonl"), "utf-8")
        _truncate_partial_line(self.file)
        self.events = EventFileWriter(str(root / "tensorboard"), filename_suffix=f".{attempt}")

    @property
    def time_s(self) -> float:
        return time.monotonic() - self.started_at

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append the metrics of an optimizer step; step 0 is before the first."""
        line = {"step": step, "time_s": round(self.time_s, 3), "attempt": self.attempt, **metrics}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()]
        self.events.add_event(
            Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        )

    def sync(self) -> None:
        """Flush everything logged so far to the run directory."""
        self.events.flush()
        if self.scratch is not None:
            fs, root = self.run.folder.fs, Path(self.scratch.name)
            for path in (p for p in root.rglob("*") if p.is_file()):
                fs.put_file(str(path), self.run.folder.path(str(path.relative_to(root))))

    def close(self) -> None:
        self.sync()
        self.events.close()
        if self.scratch is not None:
            self.scratch.cleanup()


def _truncate_partial_line(file: Path) -> None:
    """Drop the half line of a writer that died, so that the next line does not join it."""
    if file.exists():
        data = file.read_bytes()
        with file.open("r+b") as stream:
            stream.truncate(data.rfind(b"\n") + 1)


class ConsoleReporter:
    """Shows the progress of a stage: a bar with remaining time on a terminal, else lines."""

    def __init__(self, stage: str, console: Console | None = None) -> None:
        self.stage = stage
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.tasks: dict[str, Any] = {}
        self.started_at: dict[str, tuple[float, int]] = {}
        self.progress.start()

    def say(self, text: str) -> None:
        """Print a line that stays on the screen."""
        self.console.print(f"{self.stage}: {text}", markup=False)

    def advance(
        self, phase: str, done: int, total: int, facts: str = "", *, print_line: bool = False
    ) -> None:
        """Show that `phase` has done `done` of `total`; `print_line` also prints it as a line."""
        if phase not in self.tasks:
            self.started_at[phase] = (time.monotonic(), done)
            self.tasks[phase] = self.progress.add_task(
                f"{self.stage} {phase}", total=total, facts="", completed=done
            )
        self.progress.update(self.tasks[phase], completed=done, total=total, facts=facts)
        if print_line and not self.console.is_terminal:
            self.say(f"{phase} {done}/{total}  {facts}  {self._remaining(phase, done, total)}")

    def _remaining(self, phase: str, done: int, total: int) -> str:
        began, first = self.started_at[phase]
        if done <= first:
            return "--:-- left"
        seconds = int((time.monotonic() - began) / (done - first) * (total - done))
        return f"{seconds // 60}:{seconds % 60:02d} left"

    def close(self) -> None:
        self.progress.stop()

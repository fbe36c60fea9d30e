import io
import json
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from medgpt.metrics import ConsoleReporter, MetricsWriter
from medgpt.runs import Run


@pytest.fixture(params=["local", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Run]:
    url = str(tmp_path) if request.param == "local" else f"memory://{uuid4().hex}"
    run = Run(url)
    yield run
    run.folder.remove()


def test_steps_are_lines_with_step_time_and_attempt(run: Run) -> None:
    writer = MetricsWriter(run, attempt=1, time_s=0)
    writer.log(1, {"train/loss": 2.5})
    writer.log(2, {"train/loss": 2.0, "train/grad_norm": 1.0})
    writer.close()
    first, second = map(json.loads, run.folder.read_text("metrics.jsonl").splitlines())
    assert (first["step"], first["attempt"], first["train/loss"]) == (1, 1, 2.5)
    assert 0 <= first["time_s"] <= second["time_s"] < 60
    assert second["train/grad_norm"] == 1.0


def test_a_later_attempt_appends_to_the_file_and_continues_its_time(run: Run) -> None:
    for attempt, step, time_s in ((1, 1, 0.0), (2, 2, 100.0)):
        writer = MetricsWriter(run, attempt=attempt, time_s=time_s)
        writer.log(step, {"train/loss": 1.0})
        writer.close()
    assert [(line["step"], line["attempt"]) for line in run.metrics()] == [(1, 1), (2, 2)]
    assert run.metrics()[1]["time_s"] >= 100


def test_lines_can_be_read_after_a_sync(run: Run) -> None:
    writer = MetricsWriter(run, attempt=1, time_s=0)
    writer.log(1, {"train/loss": 1.0})
    writer.sync()
    assert [line["step"] for line in run.metrics()] == [1]
    writer.log(2, {"train/loss": 1.0})
    writer.close()
    assert [line["step"] for line in run.metrics()] == [1, 2]


def test_a_partial_line_of_a_dead_attempt_does_not_corrupt_the_next(run: Run) -> None:
    run.folder.write_text("metrics.jsonl", '{"step": 1, "attempt": 1}\n{"step": 2, "att')
    writer = MetricsWriter(run, attempt=2, time_s=0)
    writer.log(2, {"train/loss": 1.0})
    writer.close()
    assert [(line["step"], line["attempt"]) for line in run.metrics()] == [(1, 1), (2, 2)]


def test_tensorboard_has_the_same_numbers(run: Run) -> None:
    writer = MetricsWriter(run, attempt=1, time_s=0)
    writer.log(7, {"train/loss": 2.5})
    writer.close()
    with (run.folder / "tensorboard").local() as directory:
        (events,) = directory.iterdir()
        logged = [
            (event.step, value.tag, value.tensor.float_val[0])
            for event in EventFileLoader(str(events)).Load()
            for value in event.summary.value
        ]
    assert logged == [(7, "train/loss", 2.5)]


def make_reporter(*, terminal: bool) -> tuple[ConsoleReporter, io.StringIO]:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120, highlight=False)
    return ConsoleReporter("sft", console), text


def test_without_a_terminal_progress_is_printed_as_lines_with_remaining_time() -> None:
    reporter, text = make_reporter(terminal=False)
    reporter.say("run directory /runs/[a]")
    reporter.advance("training", 0, 100, print_line=True)
    reporter.advance("training", 5, 100, "loss 2.5")
    reporter.advance("training", 10, 100, "loss 2.0", print_line=True)
    reporter.close()
    lines = text.getvalue().splitlines()
    assert lines[0] == "sft: run directory /runs/[a]"
    assert lines[1].split() == ["sft:", "training", "0/100", "--:--", "left"]
    assert lines[2].startswith("sft: training 10/100  loss 2.0  0:00 left")
    assert len(lines) == 3


def test_on_a_terminal_progress_is_a_bar() -> None:
    reporter, text = make_reporter(terminal=True)
    reporter.advance("training", 3, 100, "loss 2.5", print_line=True)
    reporter.close()
    assert "3/100" in text.getvalue()
    assert "loss 2.5" in text.getvalue()
    assert "sft: training" not in text.getvalue()

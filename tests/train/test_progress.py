"""The console output of a training run."""

import io
import time
from queue import Queue
from threading import Thread

import pytest
from rich.console import Console

from medgpt.config.base import ConfigError
from medgpt.metrics import ConsoleReporter
from medgpt.train import progress
from medgpt.train.progress import AttemptStarted, ProgressDisplay, StepReport


def printed_lines(*messages: object) -> list[str]:
    text = io.StringIO()
    reporter = ConsoleReporter("sft", Console(file=text, soft_wrap=True))
    display = ProgressDisplay(reporter, log_every=10)
    for message in messages:
        display.show(message)
    reporter.close()
    return text.getvalue().splitlines()


def step_report(step: int, **metrics: float) -> StepReport:
    return StepReport(
        step=step, num_steps=25, metrics={k.replace("_", "/", 1): v for k, v in metrics.items()}
    )


def attempt_started(attempt: int, step: int, num_workers: int = 2) -> AttemptStarted:
    return AttemptStarted(attempt=attempt, step=step, num_workers=num_workers)


def test_every_tenth_step_and_the_last_are_printed_with_the_latest_validation_loss() -> None:
    lines = printed_lines(
        attempt_started(1, 0),
        step_report(0, validation_loss=9.0),
        *(
            step_report(step, train_loss=step / 100, train_tokens_per_s=1234.5)
            for step in range(1, 26)
        ),
    )
    assert [line.rsplit("  ", 1)[0] for line in lines] == [
        f"sft: training {step}/25  loss {loss}  validation 9.000  tokens/s 1,234"
        for step, loss in ((10, "0.100"), (20, "0.200"), (25, "0.250"))
    ]


def test_an_attempt_after_lost_workers_is_printed_once_with_its_step() -> None:
    assert printed_lines(
        attempt_started(1, 0), attempt_started(2, 20), attempt_started(3, 20, 1)
    ) == [
        "sft: workers were lost or replaced; attempt 2 continues after step 20, with 2 workers",
        "sft: workers were lost or replaced; attempt 3 continues after step 20, with 1 worker",
    ]


def test_a_resumed_run_prints_the_step_it_continues_from() -> None:
    assert printed_lines(attempt_started(4, 30)) == [
        "sft: attempt 4 continues after step 30, with 2 workers"
    ]


def test_all_queued_messages_are_shown_before_the_display_ends() -> None:
    messages: Queue[object] = Queue()
    reporter = ConsoleReporter("sft", Console(file=io.StringIO()))
    display = ProgressDisplay(reporter, log_every=10)
    follower = Thread(target=display.follow, args=(messages,))
    follower.start()
    for message in (ConfigError("a"), "a line", ConfigError("b"), None):
        messages.put(message)
    follower.join(10)
    assert not follower.is_alive()
    assert [str(error) for error in display.errors] == ["a", "b"]


@pytest.mark.parametrize("trains", [False, True])
def test_stalled_workers_are_reported_once(monkeypatch: pytest.MonkeyPatch, trains: bool) -> None:
    monkeypatch.setattr(progress, "FIRST_STEP_S", 0.1)
    monkeypatch.setattr(progress, "POLL_S", 0.2)
    messages: Queue[object] = Queue()
    text = io.StringIO()
    display = ProgressDisplay(
        ConsoleReporter("sft", Console(file=text, soft_wrap=True)), log_every=10
    )
    follower = Thread(target=display.follow, args=(messages,))
    follower.start()
    messages.put(attempt_started(1, 0))
    if trains:
        messages.put(step_report(1, train_loss=1.0))
    time.sleep(1)
    messages.put(None)
    follower.join(10)
    num_reports = text.getvalue().count("do data tasks wait for a free CPU (cluster.data_cpus)?")
    assert num_reports == (0 if trains else 1)


def test_an_unknown_message_is_an_assertion_error() -> None:
    with pytest.raises(AssertionError, match="unknown message tuple"):
        printed_lines((1, 2, {}))

"""What a person reads of a training run."""

import io
import time
from queue import Queue
from threading import Thread

import pytest
from rich.console import Console

from medgpt.config.base import ConfigError
from medgpt.metrics import ConsoleReporter
from medgpt.train import progress
from medgpt.train.progress import Display, Started, Trained


def printed(*messages: object) -> list[str]:
    text = io.StringIO()
    reporter = ConsoleReporter("sft", Console(file=text, soft_wrap=True))
    display = Display(reporter, log_every=10)
    for message in messages:
        display.show(message)
    reporter.close()
    return text.getvalue().splitlines()


def trained(step: int, **metrics: float) -> Trained:
    return Trained(
        step=step, num_steps=25, metrics={k.replace("_", "/", 1): v for k, v in metrics.items()}
    )


def start(attempt: int, step: int, num_workers: int = 2) -> Started:
    return Started(attempt=attempt, step=step, num_workers=num_workers)


def test_every_tenth_step_and_the_last_are_lines_with_the_latest_validation_loss() -> None:
    lines = printed(
        start(1, 0),
        trained(0, validation_loss=9.0),
        *(trained(step, train_loss=step / 100, train_tokens_per_s=1234.5) for step in range(1, 26)),
    )
    assert [line.rsplit("  ", 1)[0] for line in lines] == [
        f"sft: training {step}/25  loss {loss}  validation 9.000  tokens/s 1,234"
        for step, loss in ((10, "0.100"), (20, "0.200"), (25, "0.250"))
    ]


def test_a_start_after_lost_workers_is_told_once_with_its_step() -> None:
    assert printed(start(1, 0), start(2, 20), start(3, 20, 1)) == [
        "sft: workers were lost or replaced; attempt 2 continues after step 20, with 2 workers",
        "sft: workers were lost or replaced; attempt 3 continues after step 20, with 1 worker",
    ]


def test_a_command_that_resumes_a_run_says_where() -> None:
    assert printed(start(4, 30)) == ["sft: attempt 4 continues after step 30, with 2 workers"]


def test_everything_that_was_told_is_shown_before_the_display_ends() -> None:
    messages: Queue[object] = Queue()
    reporter = ConsoleReporter("sft", Console(file=io.StringIO()))
    display = Display(reporter, log_every=10)
    follower = Thread(target=display.follow, args=(messages,))
    follower.start()
    for message in (ConfigError("a"), "a line", ConfigError("b"), None):
        messages.put(message)
    follower.join(10)
    assert not follower.is_alive()
    assert [str(error) for error in display.refused] == ["a", "b"]


@pytest.mark.parametrize("trains", [False, True])
def test_workers_that_do_not_begin_are_told_of_once(
    monkeypatch: pytest.MonkeyPatch, trains: bool
) -> None:
    monkeypatch.setattr(progress, "FIRST_STEP_S", 0.1)
    monkeypatch.setattr(progress, "POLL_S", 0.2)
    messages: Queue[object] = Queue()
    text = io.StringIO()
    display = Display(ConsoleReporter("sft", Console(file=text, soft_wrap=True)), log_every=10)
    follower = Thread(target=display.follow, args=(messages,))
    follower.start()
    messages.put(start(1, 0))
    if trains:
        messages.put(trained(1, train_loss=1.0))
    time.sleep(1)
    messages.put(None)
    follower.join(10)
    told = text.getvalue().count("do data tasks wait for a free CPU (cluster.data_cpus)?")
    assert told == (0 if trains else 1)


def test_an_unknown_message_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="unknown message tuple"):
        printed((1, 2, {}))

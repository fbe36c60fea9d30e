"""A command killed by a signal is restarted a limited number of times; others are not."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from medgpt.jobs.secrets import SECRETS_VARIABLE

SUPERVISE = [sys.executable, "-m", "medgpt.jobs.supervise"]


def supervise(
    script: str, *options: str, folder: Path, **environment: str
) -> subprocess.Popen[str]:
    """Start a supervisor of `sh -c script` in `folder`."""
    return subprocess.Popen(
        [*SUPERVISE, *options, "sh", "-c", script],
        cwd=folder,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin", **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, error = process.communicate(timeout=60)
    return process.returncode, error


def num_starts(folder: Path) -> int:
    """Return how often the command was started; each start adds a line."""
    log = folder / "starts"
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait_for_file(what: Path) -> None:
    deadline = time.monotonic() + 60
    while not what.exists():
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.05)


def test_a_killed_command_runs_again_until_it_ends_by_itself(tmp_path: Path) -> None:
    script = "echo >>starts; [ $(wc -l <starts) = 2 ] && exit 0; kill -9 $$"
    code, said = wait_for_end(supervise(script, folder=tmp_path))
    assert (code, num_starts(tmp_path)) == (0, 2)
    assert said == "medgpt: signal 9 killed the command; restart 1 of 5 in 1 s\n"


def test_restarts_are_bounded_and_their_pauses_grow(tmp_path: Path) -> None:
    began = time.monotonic()
    code, said = wait_for_end(
        supervise("echo >>starts; kill -9 $$", "--restarts", "2", folder=tmp_path)
    )
    assert (code, num_starts(tmp_path)) == (137, 3)
    assert "restart 1 of 2 in 1 s" in said
    assert "restart 2 of 2 in 2 s" in said
    assert "it was restarted 2 times already, giving up" in said
    assert time.monotonic() - began > 3


@pytest.mark.parametrize("status", [0, 1, 2], ids=["success", "a bug", "ConfigError or gate"])
def test_a_command_that_ends_by_itself_is_not_restarted(tmp_path: Path, status: int) -> None:
    code, said = wait_for_end(supervise(f"echo >>starts; exit {status}", folder=tmp_path))
    assert (code, num_starts(tmp_path), said) == (status, 1, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_command_which_then_stays_ended(
    tmp_path: Path, number: signal.Signals
) -> None:
    script = "trap 'touch told; exit 7' TERM INT; echo >>starts; while :; do sleep 0.1; done"
    process = supervise(script, folder=tmp_path)
    wait_for_file(tmp_path / "starts")
    process.send_signal(number)
    assert wait_for_end(process)[0] == 7
    assert (tmp_path / "told").exists()
    assert num_starts(tmp_path) == 1


def test_a_signal_in_a_pause_ends_it(tmp_path: Path) -> None:
    process = supervise("echo >>starts; kill -9 $$", folder=tmp_path)
    wait_for_file(tmp_path / "starts")
    time.sleep(0.3)
    process.terminate()
    assert wait_for_end(process)[0] == 128 + signal.SIGTERM
    assert num_starts(tmp_path) == 1


def test_a_command_does_not_outlive_its_supervisor(tmp_path: Path) -> None:
    process = supervise("echo $$ >pid; exec sleep 60", folder=tmp_path)
    wait_for_file(tmp_path / "pid")
    time.sleep(0.3)
    command = psutil.Process(int((tmp_path / "pid").read_text()))
    process.kill()
    process.wait()
    psutil.wait_procs([command], timeout=10)
    assert not command.is_running() or command.status() == psutil.STATUS_ZOMBIE


def test_a_secret_comes_from_the_environment_or_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("of the file\n")
    process = supervise(
        'echo "$A, $B" >seen',
        folder=tmp_path,
        A="of the node",
        **{SECRETS_VARIABLE: f"A,B={tmp_path}/token"},
    )
    assert wait_for_end(process) == (0, "")
    assert (tmp_path / "seen").read_text() == "of the node, of the file\n"


@pytest.mark.parametrize("listed", ["HF_TOKEN", "HF_TOKEN=/nowhere/token"])
def test_a_missing_secret_is_named_before_the_command_runs(tmp_path: Path, listed: str) -> None:
    code, said = wait_for_end(
        supervise("echo >>starts", folder=tmp_path, **{SECRETS_VARIABLE: listed})
    )
    assert (code, num_starts(tmp_path)) == (2, 0)
    assert said.startswith(f"medgpt: --secret-env {listed}")
    assert "on every node" in said

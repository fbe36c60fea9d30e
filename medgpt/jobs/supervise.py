"""python -m medgpt.jobs.supervise [--restarts N] COMMAND...

Runs the command of a job and restarts it if a signal killed it, since Ray starts an entrypoint only
once. A command that exits by itself is not restarted, whatever its exit status: an invalid config,
a failed gate or a bug would fail again.
"""

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from medgpt.jobs.secrets import MissingSecret, load_secrets

MAX_RESTARTS = 5
FIRST_PAUSE_S = 1.0  # before the first restart; doubles up to MAX_PAUSE_S
MAX_PAUSE_S = 60.0
RESET_RESTARTS_AFTER_S = 600.0  # running time after which earlier restarts no longer count
SIGNAL_STATUS = 128  # a command killed by signal n exits with status 128 + n, as in a shell
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PR_SET_PDEATHSIG = 1


class Supervisor:
    """Runs a command and restarts it when it is killed. Call `run` once."""

    def __init__(self, command: Sequence[str], restarts: int = MAX_RESTARTS) -> None:
        self.command, self.max_restarts = command, restarts
        self.child: subprocess.Popen[bytes] | None = None
        self.stop_signal: int | None = None
        """The signal that this process received, forwarded to the command."""

    def run(self) -> int:
        """Run the command until it exits by itself; return its exit status as a shell does."""
        for number in FORWARDED:
            signal.signal(number, self._forward)
        num_crashes, pause_s = 0, FIRST_PAUSE_S
        while True:
            start_time = time.monotonic()
            status = self._run_once()
            if self.stop_signal is not None or status < SIGNAL_STATUS:
                return status
            if time.monotonic() - start_time > RESET_RESTARTS_AFTER_S:
                num_crashes, pause_s = 0, FIRST_PAUSE_S
            num_crashes += 1
            reason = f"signal {status - SIGNAL_STATUS} killed the command"
            if num_crashes > self.max_restarts:
                log(f"{reason}; it was restarted {self.max_restarts} times already, giving up")
                return status
            log(f"{reason}; restart {num_crashes} of {self.max_restarts} in {pause_s:g} s")
            self._sleep_unless_stopped(pause_s)
            if self.stop_signal is not None:
                return SIGNAL_STATUS + self.stop_signal
            pause_s = min(2 * pause_s, MAX_PAUSE_S)

    def _run_once(self) -> int:
        self.child = subprocess.Popen(self.command, preexec_fn=_die_with_parent)
        if self.stop_signal is not None:  # received while the command was starting
            self.child.send_signal(self.stop_signal)
        status = self.child.wait()
        return status if status >= 0 else SIGNAL_STATUS - status

    def _sleep_unless_stopped(self, seconds: float) -> None:
        """Sleep in short steps, because a signal does not interrupt time.sleep."""
        until = time.monotonic() + seconds
        while self.stop_signal is None and time.monotonic() < until:
            time.sleep(0.1)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.stop_signal = number
        if self.child is not None:
            self.child.send_signal(number)  # a no-op once the command was waited for


def log(text: str) -> None:
    print(f"medgpt: {text}", file=sys.stderr, flush=True)


def _die_with_parent() -> None:
    """Kill the command with its supervisor, else a second job could start the same run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--restarts", type=int, default=MAX_RESTARTS, help="maximum number of restarts in a row"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    try:
        load_secrets(os.environ)
    except MissingSecret as error:
        log(str(error))
        sys.exit(2)
    sys.exit(Supervisor(options.command, options.restarts).run())


if __name__ == "__main__":
    main()

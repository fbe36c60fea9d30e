"""python -m medgpt.jobs.supervise [--restarts N] COMMAND...

Runs the command of a job and runs it again if a signal ended it: Ray starts a job's entrypoint
once. A command that ends by itself is not repeated, whatever its exit status: a wrong config, a
failed gate and a bug stay what they are.
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
RESET_RESTARTS_AFTER_S = (
    600.0  # a command that lived so long is not counted among those that died in a row
)
SIGNAL_STATUS = 128  # a shell's exit status of a command that signal n ended is 128 + n
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PR_SET_PDEATHSIG = 1


class Supervisor:
    """Keeps one command running. `run` may be called once."""

    def __init__(self, command: Sequence[str], restarts: int = MAX_RESTARTS) -> None:
        self.command, self.max_restarts = command, restarts
        self.child: subprocess.Popen[bytes] | None = None
        self.stop_signal: int | None = None
        """The signal."""

    def run(self) -> int:
        """The exit status of the command, as a shell tells it."""
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
            reason = f"signal {status - SIGNAL_STATUS} ended the command"
            if num_crashes > self.max_restarts:
                log(f"{reason}; it was restarted {self.max_restarts} times, that is enough")
                return status
            log(f"{reason}; restart {num_crashes} of {self.max_restarts} in {pause_s:g} s")
            self._sleep_unless_stopped(pause_s)
            if self.stop_signal is not None:
                return SIGNAL_STATUS + self.stop_signal
            pause_s = min(2 * pause_s, MAX_PAUSE_S)

    def _run_once(self) -> int:
        self.child = subprocess.Popen(self.command, preexec_fn=_die_with_parent)
        if self.stop_signal is not None:  # while it was started
            self.child.send_signal(self.stop_signal)
        status = self.child.wait()
        return status if status >= 0 else SIGNAL_STATUS - status

    def _sleep_unless_stopped(self, seconds: float) -> None:
        """A signal does not end Python's sleep."""
        until = time.monotonic() + seconds
        while self.stop_signal is None and time.monotonic() < until:
            time.sleep(0.1)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.stop_signal = number
        if self.child is not None:
            self.child.send_signal(number)  # nothing, once it has been waited for


def log(text: str) -> None:
    print(f"medgpt: {text}", file=sys.stderr, flush=True)


def _die_with_parent() -> None:
    """Without a supervisor no one knows of the command, and the run may be begun a second time."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--restarts", type=int, default=MAX_RESTARTS, help="in a row")
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

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

from medgpt.jobs.secrets import MissingSecret, fill

RESTARTS = 5
PAUSE_S = 1.0  # before the first restart; doubles up to MAX_PAUSE_S
MAX_PAUSE_S = 60.0
HEALTHY_S = 600.0  # a command that lived so long is not counted among those that died in a row
SIGNAL_STATUS = 128  # a shell's exit status of a command that signal n ended is 128 + n
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PR_SET_PDEATHSIG = 1


class Supervisor:
    """Keeps one command running. `run` may be called once."""

    def __init__(self, command: Sequence[str], restarts: int = RESTARTS) -> None:
        self.command, self.restarts = command, restarts
        self.child: subprocess.Popen[bytes] | None = None
        self.told_to_end: int | None = None
        """The signal."""

    def run(self) -> int:
        """The exit status of the command, as a shell tells it."""
        for number in FORWARDED:
            signal.signal(number, self._forward)
        deaths, pause_s = 0, PAUSE_S
        while True:
            began = time.monotonic()
            status = self._run_once()
            if self.told_to_end is not None or status < SIGNAL_STATUS:
                return status
            if time.monotonic() - began > HEALTHY_S:
                deaths, pause_s = 0, PAUSE_S
            deaths += 1
            why = f"signal {status - SIGNAL_STATUS} ended the command"
            if deaths > self.restarts:
                say(f"{why}; it was restarted {self.restarts} times, that is enough")
                return status
            say(f"{why}; restart {deaths} of {self.restarts} in {pause_s:g} s")
            self._pause(pause_s)
            if self.told_to_end is not None:
                return SIGNAL_STATUS + self.told_to_end
            pause_s = min(2 * pause_s, MAX_PAUSE_S)

    def _run_once(self) -> int:
        self.child = subprocess.Popen(self.command, preexec_fn=_die_with_parent)
        if self.told_to_end is not None:  # while it was started
            self.child.send_signal(self.told_to_end)
        status = self.child.wait()
        return status if status >= 0 else SIGNAL_STATUS - status

    def _pause(self, seconds: float) -> None:
        """A signal does not end Python's sleep."""
        until = time.monotonic() + seconds
        while self.told_to_end is None and time.monotonic() < until:
            time.sleep(0.1)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.told_to_end = number
        if self.child is not None:
            self.child.send_signal(number)  # nothing, once it has been waited for


def say(text: str) -> None:
    print(f"medgpt: {text}", file=sys.stderr, flush=True)


def _die_with_parent() -> None:
    """Without a supervisor no one knows of the command, and the run may be begun a second time."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--restarts", type=int, default=RESTARTS, help="in a row")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    try:
        fill(os.environ)
    except MissingSecret as error:
        say(str(error))
        sys.exit(2)
    sys.exit(Supervisor(options.command, options.restarts).run())


if __name__ == "__main__":
    main()

"""Barrier at which early started workers wait until the driver has prepared the data."""

import time
import uuid
from dataclasses import dataclass, field

from medgpt.artifacts import Folder
from medgpt.config.base import ConfigError

RELEASED, ABORTED = "go", "stop"
POLL_S, POLL_REMOTE_S = 0.1, 1.0
TIMEOUT_S = 1800


@dataclass(frozen=True)
class StartBarrier:
    """A file in the run directory that releases or ends waiting workers. One per start."""

    run_dir: str
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def _folder(self) -> Folder:
        return Folder(self.run_dir) / "start_barrier"

    def release(self) -> None:
        """Let the workers train: all they read is in the run directory."""
        self._folder.write_text(self.token, RELEASED)

    def abort(self) -> None:
        """Let the workers end without training."""
        self._folder.write_text(self.token, ABORTED)

    def wait(self) -> bool:
        """Wait for the driver's decision; True means train. Raises ConfigError after TIMEOUT_S."""
        folder, deadline = self._folder, time.monotonic() + TIMEOUT_S
        while not folder.exists(self.token):
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{self.run_dir}: workers waited {TIMEOUT_S} s in vain while the data were "
                    "prepared; repeat the command, and the run continues"
                )
            time.sleep(POLL_S if folder.is_local else POLL_REMOTE_S)
        return folder.read_text(self.token) == RELEASED

    def remove(self) -> None:
        """Remove the files after all workers have ended."""
        self._folder.remove()

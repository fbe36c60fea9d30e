"""Workers of a small corpus start, and import for seconds, while it is prepared."""

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
    """What workers wait at, through a file in the run directory. Each start has a new one."""

    run_dir: str
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def _folder(self) -> Folder:
        return Folder(self.run_dir) / "gate"

    def release(self) -> None:
        """All that workers read is in the run directory."""
        self._folder.write_text(self.token, RELEASED)

    def abort(self) -> None:
        """There is nothing to train on; the workers end."""
        self._folder.write_text(self.token, ABORTED)

    def wait(self) -> bool:
        """Returns when the driver has decided; without a driver Ray ends the workers.

        Raises:
            ConfigError: it did not in WAIT_S.
        """
        folder, deadline = self._folder, time.monotonic() + TIMEOUT_S
        while not folder.exists(self.token):
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{self.run_dir}: workers heard nothing for {TIMEOUT_S} s while the data were "
                    "prepared; repeat the command, it goes on where it stopped"
                )
            time.sleep(POLL_S if folder.is_local else POLL_REMOTE_S)
        return folder.read_text(self.token) == RELEASED

    def remove(self) -> None:
        """When the workers are gone."""
        self._folder.remove()

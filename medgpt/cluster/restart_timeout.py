"""A run whose workers were lost waits for nodes: it says so, and not for ever."""

import time
from typing import Any, Protocol

# Ray Train has no public word for this; it lets callbacks like its own ones come with a RunConfig
from medgpt.cluster.ray_internals import (
    ControllerCallback,
    InitializingState,
    ReschedulingState,
    RestartingState,
    SchedulingState,
)
from medgpt.config.base import ConfigError
from medgpt.config.train import ClusterConfig

WAITING = (InitializingState, SchedulingState, ReschedulingState, RestartingState)
SAID_AFTER_S = 30  # a restart takes less
PAUSE_S = 1


class Messages(Protocol):
    """Where the driver reads."""

    def put(self, item: Any) -> None: ...


class Waiting(ControllerCallback):
    """Runs in Ray Train's controller, which alone knows that there are no workers."""

    def __init__(self, cluster: ClusterConfig, messages: Messages) -> None:
        self.cluster, self.messages = cluster, messages
        self.since: float | None = None
        self.said = False

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if not isinstance(current_state, WAITING):
            self.since, self.said = None, False
            return
        now = time.monotonic()
        self.since = self.since or now
        room = f"room for {self.cluster.fewest_workers} workers"
        if now - self.since > self.cluster.wait_s:
            error = ConfigError(
                f"cluster.wait_s={self.cluster.wait_s:g}: no {room} in this time; repeat the "
                "command when the cluster has its nodes again, the run continues"
            )
            self.messages.put(error)
            raise error
        if now - self.since > SAID_AFTER_S and not self.said:
            self.messages.put(f"waiting up to {self.cluster.wait_s:g} s for {room}")
            self.said = True
        if current_state is previous_state:
            time.sleep(PAUSE_S)  # Ray Train would ask again at once, for as long as it takes

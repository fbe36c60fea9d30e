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

WAITING_STATES = (InitializingState, SchedulingState, ReschedulingState, RestartingState)
ANNOUNCE_AFTER_S = 30  # a restart takes less
POLL_S = 1


class MessageQueue(Protocol):
    """Where the driver reads."""

    def put(self, item: Any) -> None: ...


class RestartTimeout(ControllerCallback):
    """Runs in Ray Train's controller, which alone knows that there are no workers."""

    def __init__(self, cluster: ClusterConfig, messages: MessageQueue) -> None:
        self.cluster, self.messages = cluster, messages
        self.waiting_since: float | None = None
        self.announced = False

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if not isinstance(current_state, WAITING_STATES):
            self.waiting_since, self.announced = None, False
            return
        now = time.monotonic()
        self.waiting_since = self.waiting_since or now
        resources = f"room for {self.cluster.min_workers} workers"
        if now - self.waiting_since > self.cluster.wait_s:
            error = ConfigError(
                f"cluster.wait_s={self.cluster.wait_s:g}: no {resources} in this time; repeat the "
                "command when the cluster has its nodes again, the run continues"
            )
            self.messages.put(error)
            raise error
        if now - self.waiting_since > ANNOUNCE_AFTER_S and not self.announced:
            self.messages.put(f"waiting up to {self.cluster.wait_s:g} s for {resources}")
            self.announced = True
        if current_state is previous_state:
            time.sleep(POLL_S)  # Ray Train would ask again at once, for as long as it takes

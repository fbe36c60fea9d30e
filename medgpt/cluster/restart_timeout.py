"""Bound and announce the wait of a run that has lost its workers."""

import time
from typing import TYPE_CHECKING, Any

# Ray Train has no public hook for this, but its RunConfig accepts its internal callback class
from medgpt.cluster import ray_train_internals as internals
from medgpt.cluster.wait_for_resources import waiting_line
from medgpt.config.base import ConfigError
from medgpt.config.train import ClusterConfig

if TYPE_CHECKING:
    from ray.util.queue import Queue

WAITING_STATES = (
    internals.InitializingState,
    internals.SchedulingState,
    internals.ReschedulingState,
    internals.RestartingState,
)
ANNOUNCE_AFTER_S = 30  # longer than an ordinary restart
POLL_S = 1


class RestartTimeout(internals.ControllerCallback):
    """Ends a run that waits longer than `cluster.wait_s` for workers. Runs in the controller."""

    def __init__(self, cluster: ClusterConfig, messages: "Queue") -> None:
        self.cluster, self.messages = cluster, messages
        self.waiting_since: float | None = None
        self.announced = False

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if not isinstance(current_state, WAITING_STATES):
            self.waiting_since, self.announced = None, False
            return
        now = time.monotonic()
        self.waiting_since = self.waiting_since or now
        resources = f"resources for {self.cluster.min_workers} workers"
        if now - self.waiting_since > self.cluster.wait_s:
            error = ConfigError(
                f"cluster.wait_s={self.cluster.wait_s:g}: no {resources} in this time; repeat the "
                "command when the cluster has enough nodes, and the run continues"
            )
            self.messages.put(error)
            raise error
        if now - self.waiting_since > ANNOUNCE_AFTER_S and not self.announced:
            self.messages.put(waiting_line(self.cluster.wait_s, resources))
            self.announced = True
        if current_state is previous_state:
            time.sleep(POLL_S)  # Ray Train would poll without a pause

"""Ray Data settings without a public API. `cluster/ray_internals.py` has the rest of Ray."""

import time
from typing import Any

from ray.data._internal.cluster_autoscaler.resource_utilization_gauge import ClusterUtil
from ray.data._internal.execution.execution_callback import ExecutionCallback

IDLE_STEP_S = 0.05
UNREACHABLE = ClusterUtil(cpu=1e9, gpu=1e9, memory=1e9, object_store_memory=1e9)


class ThrottleIdleLoop(ExecutionCallback):
    """Makes idle steps of Ray Data's scheduling loop sleep, so that the trainer gets the core.

    The loop waits only for running tasks. While its output is full, which is most of the time here,
    it would spin and hold the GIL half of the time.
    """

    def __init__(self) -> None:
        self.task_counts: list[tuple[int, int]] = []
        self.last_step_at = time.monotonic()

    def on_execution_step(self, executor: Any) -> None:
        task_counts = [
            (op.metrics.num_tasks_submitted, op.metrics.num_task_outputs_generated)
            for op in executor._topology
        ]
        remaining_s = self.last_step_at + IDLE_STEP_S - time.monotonic()
        if task_counts == self.task_counts and remaining_s > 0:
            time.sleep(remaining_s)
        self.task_counts, self.last_step_at = task_counts, time.monotonic()


class NoAutoscaling(ThrottleIdleLoop):
    """Stops Ray Data from requesting nodes.

    Otherwise it requests twice the cluster as soon as half of it is busy, even if only with workers
    that wait for data.
    """

    def before_execution_starts(self, executor: Any) -> None:
        executor._cluster_autoscaler._cluster_scaling_up_util_threshold = UNREACHABLE

"""What Ray Data has no public setting for; `cluster/ray_internals.py` has the rest of Ray."""

import time
from typing import Any

from ray.data._internal.cluster_autoscaler.resource_utilization_gauge import ClusterUtil
from ray.data._internal.execution.execution_callback import ExecutionCallback

IDLE_STEP_S = 0.05
UNREACHABLE = ClusterUtil(cpu=1e9, gpu=1e9, memory=1e9, object_store_memory=1e9)  # so busy is none


class ThrottleIdleLoop(ExecutionCallback):
    """Gives the trainer its core back.

    Ray Data's scheduling loop waits only for running tasks; while its output is full, most of the
    time here, it would spin and hold the interpreter's lock for half of it. A step that neither
    waited nor moved anything is made to wait.
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
    """Asks for no nodes. As soon as half of the cluster is busy, and be it with those who wait for
    the data, Ray Data would ask for twice as much of it."""

    def before_execution_starts(self, executor: Any) -> None:
        executor._cluster_autoscaler._cluster_scaling_up_util_threshold = UNREACHABLE

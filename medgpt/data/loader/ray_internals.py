"""What Ray Data has no public setting for; `cluster/ray_internals.py` has the rest of Ray."""

import time
from typing import Any

from ray.data._internal.cluster_autoscaler.resource_utilization_gauge import ClusterUtil
from ray.data._internal.execution.execution_callback import ExecutionCallback

PACE_S = 0.05
NEVER = ClusterUtil(cpu=1e9, gpu=1e9, memory=1e9, object_store_memory=1e9)  # so busy is none


class Pace(ExecutionCallback):
    """Gives the trainer its core back.

    Ray Data's scheduling loop waits only for running tasks; while its output is full, most of the
    time here, it would spin and hold the interpreter's lock for half of it. A step that neither
    waited nor moved anything is made to wait.
    """

    def __init__(self) -> None:
        self.moved: list[tuple[int, int]] = []
        self.ended = time.monotonic()

    def on_execution_step(self, executor: Any) -> None:
        moved = [
            (op.metrics.num_tasks_submitted, op.metrics.num_task_outputs_generated)
            for op in executor._topology
        ]
        left = self.ended + PACE_S - time.monotonic()
        if moved == self.moved and left > 0:
            time.sleep(left)
        self.moved, self.ended = moved, time.monotonic()


class Modest(Pace):
    """Asks for no nodes. As soon as half of the cluster is busy, and be it with those who wait for
    the data, Ray Data would ask for twice as much of it."""

    def before_execution_starts(self, executor: Any) -> None:
        executor._cluster_autoscaler._cluster_scaling_up_util_threshold = NEVER

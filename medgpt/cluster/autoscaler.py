"""State of the cluster's autoscaler: version 1, version 2 or none."""

from collections.abc import Mapping
from typing import Any

from medgpt.cluster.ray_internals import autoscaler_pb2, global_worker, ray_state


def autoscaling_state() -> Any | None:
    """Return the latest AutoscalingState of a version 2 autoscaler, or None without one."""
    reply = autoscaler_pb2.GetClusterStatusReply()  # pyright: ignore  # generated code
    worker: Any = global_worker
    reply.ParseFromString(worker.gcs_client.get_cluster_status())
    state = reply.autoscaling_state
    return state if state.autoscaler_state_version else None


def max_cluster_resources() -> Mapping[str, float] | None:
    """Return the resources the cluster can grow to, if `clusters/publish_limits.py` set them."""
    return ray_state.get_max_resources_from_cluster_config()


def has_autoscaler() -> bool:
    return max_cluster_resources() is not None or autoscaling_state() is not None

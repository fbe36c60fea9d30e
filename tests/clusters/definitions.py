"""Cluster definitions as Ray's autoscaler reads them."""

import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingReply, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.common_pb2 import LabelSelectorOperator

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "clusters"
LAUNCHED = ("local", "aws", "gcp", "aliyun")
CLOUDS = ("aws", "gcp", "aliyun")
ALL = (*LAUNCHED, "kuberay")
HEADS = ("head", "ray.head.default", "headgroup")


def definition(name: str) -> dict[str, Any]:
    """Return the parsed file."""
    return yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text("utf-8"))


def manifest(path: str) -> dict[str, Any]:
    """Return a manifest of clusters/kuberay."""
    return yaml.safe_load((CLUSTERS / "kuberay" / path).read_text("utf-8"))


def ray_job() -> dict[str, Any]:
    """Return the RayJob as Kustomize builds it, with the cluster inside."""
    job = manifest("job/rayjob.yaml")
    job["spec"]["rayClusterSpec"] = manifest("cluster/raycluster.yaml")["spec"]
    return job


def kustomized(folder: str) -> list[dict[str, Any]] | None:
    """Return what `kubectl apply -k` would send; None without kubectl."""
    if shutil.which("kubectl") is None:
        return None
    command = ["kubectl", "kustomize", str(CLUSTERS / "kuberay" / folder)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return list(yaml.safe_load_all(text))


@cache
def autoscaling(name: str) -> AutoscalingConfig:
    """Return the definition with Ray's defaults, validated by Ray."""
    if name != "kuberay":
        tree = definition(name)
        tree.get("auth", {}).pop("ssh_private_key", None)  # Ray would read it
        return AutoscalingConfig(tree, skip_content_hash=True)
    cluster = manifest("cluster/raycluster.yaml")
    cluster["metadata"]["namespace"] = "default"
    tree = _derive_autoscaling_config_from_ray_cr(cluster)
    return AutoscalingConfig(tree, skip_content_hash=True)


def groups(name: str) -> dict[str, Any]:
    """Return the worker groups by name."""
    configs = autoscaling(name).get_node_type_configs()
    return {key: config for key, config in configs.items() if key not in HEADS}


def schedule(name: str, *bundles: tuple[dict[str, float], dict[str, str]]) -> SchedulingReply:
    """Return what the autoscaler would launch for bundles with labels, from zero workers."""
    config = autoscaling(name)
    requests = [
        ResourceRequestUtil.make(
            resources,
            label_selectors=[
                [
                    (key, LabelSelectorOperator.LABEL_OPERATOR_IN, [value])
                    for key, value in labels.items()
                ]
            ],
        )
        for resources, labels in bundles
    ]
    return ResourceDemandScheduler(event_logger=None).schedule(
        SchedulingRequest(
            node_type_configs=config.get_node_type_configs(),
            disable_launch_config_check=True,
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count(requests),
        )
    )


def launched(reply: SchedulingReply) -> dict[str, int]:
    return {
        request.instance_type: request.count
        for request in reply.to_launch
        if request.instance_type not in HEADS
    }

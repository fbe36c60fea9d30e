"""Publishes the limits of the autoscaler in the head, where jobs can read them.

Ray has a key for them that its open-source autoscalers do not set. medgpt reads it to refuse
workers that can never be placed. Run on the head, or with --address, after `ray start --head`:

    python clusters/publish_limits.py DEFINITION.yaml [--address HOST:PORT]

DEFINITION is a file of the cluster launcher or a RayCluster manifest.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import yaml
from ray._private.ray_constants import DEFAULT_PORT
from ray._raylet import (
    GCS_AUTOSCALER_CLUSTER_CONFIG_KEY,
    GCS_AUTOSCALER_STATE_NAMESPACE,
    GcsClient,
)
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.core.generated.autoscaler_pb2 import ClusterConfig
from ray.util import get_node_ip_address

HEAD_TIMEOUT_S = 60  # to wait until the head answers


def load_definition(path: Path) -> dict[str, Any]:
    """Return the definition of a launcher's file or a RayCluster manifest in the launcher's
    format."""
    tree = yaml.safe_load(path.read_text("utf-8"))
    if tree.get("kind") != "RayCluster":
        return tree
    tree["metadata"].setdefault("namespace", "default")  # the default of kubectl
    return _derive_autoscaling_config_from_ray_cr(tree)


def cluster_config(tree: dict[str, Any]) -> ClusterConfig:
    """Return the limits of all node groups except the head."""
    config = ClusterConfig()
    for name, group in tree["available_node_types"].items():
        if name == tree["head_node_type"]:
            continue
        config.node_group_configs.add(
            name=name,
            resources={key: int(amount) for key, amount in group["resources"].items()},
            min_count=group.get("min_workers", 0),
            max_count=min(group.get("max_workers", tree["max_workers"]), tree["max_workers"]),
        )
    return config


def publish(config: ClusterConfig, address: str) -> None:
    """Write the limits to the key that ray._private.state.get_cluster_config reads."""
    deadline = time.monotonic() + HEAD_TIMEOUT_S
    while True:
        try:
            GcsClient(address=address).internal_kv_put(
                GCS_AUTOSCALER_CLUSTER_CONFIG_KEY.encode(),
                config.SerializeToString(),
                True,
                GCS_AUTOSCALER_STATE_NAMESPACE.encode(),
            )
            return
        except Exception:  # Ray raises several types while the head is starting
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("definition", type=Path)
    parser.add_argument("--address")
    options = parser.parse_args()
    address = options.address or f"{get_node_ip_address()}:{DEFAULT_PORT}"
    publish(cluster_config(load_definition(options.definition)), address)


if __name__ == "__main__":
    main()

"""Node provider of the local cluster: raylets on this machine, derived from Ray's provider for
tests.

Ray's provider gives all nodes the same runtime_env folder, where a starting node deletes the
working directories of running jobs. Here each node has its own folder.
"""

import json
from typing import Any

from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._private.ray_constants import LABELS_ENVIRONMENT_VARIABLE, RESOURCES_ENVIRONMENT_VARIABLE
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)


class Nodes(FakeMultiNodeProvider):
    def _create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        """Start one node; the caller calls this `count` times."""
        with self.lock:
            name = self._next_hex_node_id()
            other_resources = {**resources}
            parameters = RayParams(
                gcs_address=self._gcs_address,
                redis_address=self._gcs_address,
                num_cpus=other_resources.pop("CPU", 0),
                num_gpus=other_resources.pop("GPU", 0),
                object_store_memory=other_resources.pop("object_store_memory", None),
                resources=other_resources,
                labels=labels,
                min_worker_port=0,
                max_worker_port=0,
                dashboard_agent_listen_port=0,
                runtime_env_dir_name=f"runtime_resources_{name[-5:]}",
                env_vars={
                    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": name,
                    "RAY_CLOUD_INSTANCE_ID": name,
                    "RAY_NODE_TYPE_NAME": tags[TAG_RAY_USER_NODE_TYPE],
                    RESOURCES_ENVIRONMENT_VARIABLE: json.dumps(other_resources),
                    LABELS_ENVIRONMENT_VARIABLE: json.dumps(labels),
                },
            )
            node = Node(parameters, head=False, shutdown_at_exit=False, spawn_reaper=False)
            own_tags = {
                TAG_RAY_NODE_KIND: NODE_KIND_WORKER,
                TAG_RAY_NODE_NAME: name,
                TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
            }
            self._nodes[name] = {"tags": {**own_tags, **tags}, "node": node}

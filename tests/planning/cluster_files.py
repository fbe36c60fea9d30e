"""Cluster definitions to plan for."""

import copy
from pathlib import Path
from typing import Any

import yaml

GPU_CLUSTER: dict[str, Any] = {
    "cluster_name": "test",
    "max_workers": 6,
    "metadata": {"usd_per_hour": {"head": 0.5, "data": 1, "train": 20}},
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 0}, "max_workers": 0, "node_config": {}},
        "data": {"resources": {"CPU": 16}, "max_workers": 4, "labels": {"role": "data"}},
        "train": {
            "resources": {"CPU": 64, "GPU": 8},
            "max_workers": 4,
            "labels": {"role": "train", "ray.io/accelerator-type": "H100"},
        },
    },
}


def write_cluster_file(folder: Path, **changes: Any) -> Path:
    """Write GPU_CLUSTER with changed values of `section__key`; None removes a key."""
    tree = copy.deepcopy(GPU_CLUSTER)
    for key, value in changes.items():
        *path, last = key.split("__")
        section = tree
        for name in path:
            section = section[name]
        if value is None:
            del section[last]
        else:
            section[last] = value
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(tree), "utf-8")
    return file

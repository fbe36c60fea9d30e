# ruff: noqa: F401 - other modules import these names from here
"""Ray's private names. Ray Train's are in `ray_train_internals.py`, which takes a second to import,
and Ray Data's in `data/loader/ray_internals.py`.

Ray may change them in any release, so a test imports all of them from the pinned one.
"""

import importlib
from typing import Any

from ray._common.utils import get_default_system_temp_dir
from ray._private import ray_constants
from ray._private.runtime_env.packaging import create_package
from ray._private.state import state as ray_state
from ray._private.worker import global_worker

# generated code, in which pyright sees no names
autoscaler_pb2: Any = importlib.import_module("ray.core.generated.autoscaler_pb2")
common_pb2: Any = importlib.import_module("ray.core.generated.common_pb2")

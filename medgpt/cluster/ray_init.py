"""The Ray that a stage runs on: a cluster, or a local one that starts quietly."""

import logging
import os
import socket
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import psutil
import ray

from medgpt.cluster.autoscaler import has_autoscaler
from medgpt.cluster.ray_internals import get_default_system_temp_dir, ray_constants
from medgpt.config.base import ConfigError
from medgpt.config.train import ClusterConfig

NODE_TIMEOUT_TEXT = "timed out during startup"  # in the message of Ray's error
CONNECT_TIMEOUT_S = 20  # longest wait for a cluster to answer
SILENT_INIT: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
LOCAL_OBJECT_STORE_BYTES = 512 * 2**20
RAY_ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # the first error of a pool is raised; what its other workers say then is not read
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    # an elastic restart may count on a node that is gone, and looks again only after this
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "TOKENIZERS_PARALLELISM": "false",
}
# one machine is not preempted, its workers are polled for nothing, no one reads metrics
LOCAL_RAY_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
}


def init_ray(cluster: ClusterConfig) -> None:
    """Connect to RAY_ADDRESS, or start a Ray on this machine's CPUs; once in a process.

    The local Ray has one logical CPU more than the machine: data tasks are light and run beside
    the workers, which reserve the real ones.

    Raises:
        ConfigError: nobody answers at RAY_ADDRESS, or this machine is too busy.
    """
    if ray.is_initialized():
        return
    if address := os.environ.get("RAY_ADDRESS"):
        check_address(address)
        os.environ.update(RAY_ENVIRONMENT)
        ray.init(address=address, **SILENT_INIT)
        if isinstance(cluster.num_workers, int) and _is_single_fixed_node():
            os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
        _silence_libraries()
    else:
        start_local((os.cpu_count() or 1) + cluster.data_cpus, cluster.spill_dir)


def _is_single_fixed_node() -> bool:
    """Whether the cluster is this machine and stays so; it is not preempted without the command."""
    return len(ray.nodes()) == 1 and not has_autoscaler()


def check_address(address: str) -> None:
    """Raises ConfigError if no one listens there; Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # auto
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(
            f"RAY_ADDRESS={address}: no cluster answers ({error}); start it, or unset RAY_ADDRESS "
            "for a Ray on this machine"
        ) from None


def start_local(num_cpus: float, spill_dir: str | None = None, *, loopback: bool = True) -> None:
    """Start a Ray on this machine and connect to it.

    A bare `ray.init()` could join a dead cluster's leftovers, so local is said explicitly. Its
    objects are patients' texts, so nobody else can enter the folders of its logs and spilled
    objects, and none of its ports can be reached from outside.

    Args:
        loopback: its ports are open to this machine alone, and only processes that it starts itself
            can use it; else also commands with RAY_ADDRESS.

    Raises:
        ConfigError: the machine is too busy, or a folder cannot be made private.
    """
    os.environ.update(RAY_ENVIRONMENT | LOCAL_RAY_ENVIRONMENT)
    # Ray opens the folder that it is given to everyone, but nobody gets there
    folder = f"{private_folder(get_default_system_temp_dir())}/ray"
    start = partial(
        ray.init,
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        object_store_memory=LOCAL_OBJECT_STORE_BYTES,
        object_spilling_directory=private_folder(spill_dir) if spill_dir else None,
        _temp_dir=folder,
        **SILENT_INIT,
    )
    with _loopback_only() if loopback else nullcontext():
        start_with_retry(start)
    # nothing is forwarded to this process, but Ray looks for it ten times a second
    children = psutil.Process().children()
    _kill_processes(
        child for child in children if any("log_monitor" in word for word in child.cmdline())
    )
    _silence_libraries()


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Let a Ray that starts open its ports to this machine alone, as it does on macOS.

    On Linux it opens them to every interface, and changes `_node_ip_address="127.0.0.1"` to one
    that others reach.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def private_folder(parent: str) -> str:
    """A folder in `parent` that only its owner can enter; made if there is none.

    Raises:
        ConfigError: it cannot be made, or somebody else has made it.
    """
    path = f"{parent}/medgpt-{os.getuid()}"
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        status = os.lstat(path)  # a link could lead to a folder of somebody else
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise ConfigError(
                f"{path} is not a folder of your own; remove it, or set another RAY_TMPDIR or "
                "cluster.spill_dir"
            )
        os.chmod(path, 0o700)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be made private: {error}; set another RAY_TMPDIR or cluster.spill_dir"
        ) from None
    return path


def start_with_retry(start: Callable[[], Any]) -> None:
    """Call `start` a second time if the first failed by Ray's time limit for a node, 30 s.

    Raises:
        ConfigError: the second one did, too.
    """
    for _ in range(2):
        before = set(psutil.Process().children())
        try:
            start()
            return
        except Exception as error:  # Ray's own is no narrower
            if NODE_TIMEOUT_TEXT not in str(error):
                raise
            ray.shutdown()
            _kill_processes(set(psutil.Process().children()) - before)
    raise ConfigError(
        "Ray did not start within twice 30 s, this machine is too busy; try again when there is "
        "less load, or set RAY_ADDRESS to a cluster"
    )


def _kill_processes(processes: Iterable[psutil.Process]) -> None:
    """Ray forgets what it started of a node that did not come up; it would slow down the next."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
            process.wait(10)


def _silence_libraries() -> None:
    import ray.data  # after the start of Ray, which it would delay

    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False

"""Connect to the Ray cluster at RAY_ADDRESS, or start a private Ray on this machine."""

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

from medgpt.cluster.capacity import has_autoscaler
from medgpt.cluster.ray_internals import get_default_system_temp_dir, ray_constants
from medgpt.config.base import ConfigError
from medgpt.config.train import ClusterConfig

NODE_TIMEOUT_TEXT = "timed out during startup"  # Ray raises a plain Exception with it
CONNECT_TIMEOUT_S = 20  # for a cluster to answer
SILENT_INIT: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
LOCAL_OBJECT_STORE_BYTES = 512 * 2**20
RAY_ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # medgpt raises the first error of a pool; Ray need not print those of the other workers
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    # an elastic restart may wait this long for workers on a lost node before it counts nodes again
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "TOKENIZERS_PARALLELISM": "false",
}
# a single machine is not preempted, and nobody reads Ray's metrics of it
LOCAL_RAY_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
}


def init_ray(cluster: ClusterConfig) -> None:
    """Connect to RAY_ADDRESS, or start Ray on this machine. Does nothing if Ray is initialized.

    A local Ray has `cluster.data_cpus` logical CPUs more than the machine: data tasks are light and
    run beside the workers, which reserve the real CPUs. Raises ConfigError if Ray does not answer.
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
    """Return whether the cluster is one node; a preemption would end this command, too."""
    return len(ray.nodes()) == 1 and not has_autoscaler()


def check_address(address: str) -> None:
    """Raise ConfigError if nothing listens at `address`; Ray itself would retry for minutes."""
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
    """Start Ray on this machine and connect to it, or raise ConfigError.

    The address is "local" because a bare `ray.init()` may join what a dead cluster left behind.
    Ray's objects hold patient text, so only the owner can enter the folders for logs and spilled
    objects. With `loopback` the ports are open to this machine only, and other commands cannot
    join by RAY_ADDRESS.
    """
    os.environ.update(RAY_ENVIRONMENT | LOCAL_RAY_ENVIRONMENT)
    # Ray makes its own folder world-writable, but nobody else can enter the parent
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
    # no logs are forwarded to this process, yet Ray's log monitor polls ten times a second
    children = psutil.Process().children()
    _kill_processes(
        child for child in children if any("log_monitor" in word for word in child.cmdline())
    )
    _silence_libraries()


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Make a starting Ray open its ports to this machine only, as it does on macOS.

    On Linux Ray binds all interfaces and replaces `_node_ip_address="127.0.0.1"` by a public one.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def private_folder(parent: str) -> str:
    """Create or find a folder in `parent` that only this user can enter, or raise ConfigError."""
    path = f"{parent}/medgpt-{os.getuid()}"
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        status = os.lstat(path)  # a link could lead to another user's folder
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
    """Call `start`, twice if a node misses Ray's startup limit of 30 s, then raise ConfigError."""
    for _ in range(2):
        before = set(psutil.Process().children())
        try:
            start()
            return
        except Exception as error:  # Ray raises no narrower class
            if NODE_TIMEOUT_TEXT not in str(error):
                raise
            ray.shutdown()
            _kill_processes(set(psutil.Process().children()) - before)
    raise ConfigError(
        "Ray did not start within twice 30 s because this machine is too busy; try again when the "
        "load is lower, or set RAY_ADDRESS to a cluster"
    )


def _kill_processes(processes: Iterable[psutil.Process]) -> None:
    """Kill what Ray started for a node that failed; it would slow down the next start."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
            process.wait(10)


def _silence_libraries() -> None:
    import ray.data  # not earlier: it would delay the start of Ray

    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False

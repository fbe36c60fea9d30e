"""Reserve CPUs for data tasks, which an elastic run would otherwise give to workers."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

# Ray Train gets the number of workers from this actor; no public API lowers it
from medgpt.cluster import ray_train_internals as internals

EXPIRE_AFTER_S = 180  # after the last renewal, when the driver is gone
RENEW_EVERY_S = 60


@contextmanager
def reserve_cpus_for_data(run_dir: str, cpus: float) -> Iterator[None]:
    """Keep `cpus` out of the resources that Ray Train counts for workers.

    Requests of equal priority are served in order, so enter this before training starts.
    """
    coordinator: Any = internals.get_or_create_autoscaling_coordinator()
    name = f"medgpt-data-{run_dir}"  # the same name when the command is repeated

    def request() -> None:
        ray.get(
            coordinator.request_resources.remote(
                requester_id=name,
                resources=[{"CPU": cpus}],
                expire_after_s=EXPIRE_AFTER_S,
                priority=internals.ResourceRequestPriority.HIGH,
            )
        )

    def renew() -> None:
        while not stopped.wait(RENEW_EVERY_S):
            request()

    stopped = threading.Event()
    request()
    threading.Thread(target=renew, daemon=True).start()
    try:
        yield
    finally:
        stopped.set()
        coordinator.cancel_request.remote(name)

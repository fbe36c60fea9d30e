"""The announcement and the end of a wait for lost workers."""

import pickle
import time
from queue import Queue
from typing import Any

import pytest
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    RestartingState,
    RunningState,
)
from ray.train.v2.api.exceptions import WorkerGroupError

from medgpt.cluster import restart_timeout
from medgpt.cluster.restart_timeout import RestartTimeout
from medgpt.config.base import ConfigError
from medgpt.config.train import ClusterConfig

WORKERS_LOST = RestartingState(WorkerGroupError("lost", {}))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restart_timeout, "ANNOUNCE_AFTER_S", 0.1)
    monkeypatch.setattr(restart_timeout, "POLL_S", 0.05)


def messages_of(wait: RestartTimeout) -> list[Any]:
    assert isinstance(wait.messages, Queue)
    return list(wait.messages.queue)


def test_a_wait_is_announced_once_and_times_out_with_a_remedy() -> None:
    wait = RestartTimeout(ClusterConfig(num_workers=(2, 4), wait_s=0.4), Queue())
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"cluster\.wait_s=0\.4: no resources for 2 workers"):
        all(
            wait.after_controller_state_update(WORKERS_LOST, WORKERS_LOST) is None
            for _ in range(1000)
        )
    assert 0.4 < time.monotonic() - began < 5
    announcement, error = messages_of(wait)
    assert announcement == "waiting up to 0.4 s for resources for 2 workers"
    assert isinstance(error, ConfigError)
    assert "repeat the command" in str(pickle.loads(pickle.dumps(error)))


def test_every_wait_has_its_own_timeout() -> None:
    wait = RestartTimeout(ClusterConfig(wait_s=0.3), Queue())
    for _ in range(4):
        wait.after_controller_state_update(RunningState(), WORKERS_LOST)
        time.sleep(0.2)
        wait.after_controller_state_update(WORKERS_LOST, InitializingState())
        wait.after_controller_state_update(InitializingState(), RunningState())
    assert len(messages_of(wait)) == 4

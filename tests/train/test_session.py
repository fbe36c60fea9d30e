"""A Ray is found or started, or the reason why not is told at once."""

import socket
import subprocess
import sys

import psutil
import pytest

from medgpt.config import ConfigError
from medgpt.train.session import check_address, start_patiently

SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)"]


class SlowNode:
    """Fails as `ray.init` does for the first times, and leaves a process behind each time."""

    def __init__(self, failures: int, message: str = "The current node timed out during startup."):
        self.failures, self.message = failures, message
        self.left: list[psutil.Process] = []

    def __call__(self) -> None:
        if len(self.left) < self.failures:
            self.left.append(psutil.Process(subprocess.Popen(SLEEPER).pid))
            raise Exception(self.message)


def test_a_start_that_timed_out_is_tried_once_more_without_what_it_left() -> None:
    node = SlowNode(failures=1)
    start_patiently(node)
    (left,) = node.left
    assert not left.is_running()


def test_a_machine_that_is_too_busy_twice_is_told() -> None:
    node = SlowNode(failures=2)
    with pytest.raises(ConfigError, match=r"too busy; try again .* or set RAY_ADDRESS"):
        start_patiently(node)
    assert len(node.left) == 2


def test_another_failure_is_not_tried_again() -> None:
    node = SlowNode(failures=2, message="no space left on device")
    with pytest.raises(Exception, match="no space"):
        start_patiently(node)
    (left,) = node.left
    left.kill()


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_ray_address_is_checked_before_ray_tries_it_for_minutes(scheme: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"^RAY_ADDRESS={address}: no cluster answers"):
            check_address(address)
        listener.listen()
        check_address(address)
    check_address("auto")

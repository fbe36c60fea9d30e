"""Workers wait for the decision of their own driver."""

import pickle
import threading
import time
from pathlib import Path

import pytest

from medgpt.config.base import ConfigError
from medgpt.train import start_barrier
from medgpt.train.start_barrier import StartBarrier


@pytest.mark.parametrize("go", [True, False])
def test_workers_wait_for_their_own_drivers_decision(tmp_path: Path, go: bool) -> None:
    barrier, other = StartBarrier(str(tmp_path)), StartBarrier(str(tmp_path))
    decisions: list[bool] = []
    copy: StartBarrier = pickle.loads(pickle.dumps(barrier))
    worker = threading.Thread(target=lambda: decisions.append(copy.wait()))
    worker.start()
    other.release() if not go else other.abort()  # the barrier of another start of the run
    time.sleep(0.3)
    assert worker.is_alive()
    barrier.release() if go else barrier.abort()
    worker.join(5)
    assert decisions == [go]
    barrier.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_timeout_at_the_start_barrier_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_barrier, "TIMEOUT_S", 0.2)
    with pytest.raises(ConfigError, match=r"waited 0\.2 s in vain .* repeat the command"):
        StartBarrier(str(tmp_path)).wait()

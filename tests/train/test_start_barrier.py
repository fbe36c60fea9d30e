"""Workers wait for the driver's word, and only for that of their own start."""

import pickle
import threading
import time
from pathlib import Path

import pytest

from medgpt.config.base import ConfigError
from medgpt.train import start_barrier as gate_module
from medgpt.train.start_barrier import Gate


@pytest.mark.parametrize("go", [True, False])
def test_a_worker_waits_and_does_what_the_driver_says(tmp_path: Path, go: bool) -> None:
    gate, other = Gate(str(tmp_path)), Gate(str(tmp_path))
    found: list[bool] = []
    copy: Gate = pickle.loads(pickle.dumps(gate))
    worker = threading.Thread(target=lambda: found.append(copy.passed()))
    worker.start()
    other.open() if not go else other.refuse()  # of another start of the same run
    time.sleep(0.3)
    assert worker.is_alive()
    gate.open() if go else gate.refuse()
    worker.join(5)
    assert found == [go]
    gate.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_wait_ends_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "WAIT_S", 0.2)
    with pytest.raises(ConfigError, match=r"heard nothing for 0\.2 s .* repeat the command"):
        Gate(str(tmp_path)).passed()

"""A killed run resumes with the same batches and losses, on any number of workers."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray

from medgpt.config.base import ConfigError
from medgpt.runs import Run
from medgpt.stages.train import run_pretrain
from tests.train.audit_log import assert_every_chunk_once, chunks_by_step
from tests.train.tiny_configs import pretrain_config, write_toml

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
KILL_AFTER_STEP = 20  # steps; there are checkpoints after 10, 20, ...


def metric_by_step(run: Run, name: str) -> dict[int, float]:
    return {m["step"]: m[name] for m in run.metrics() if name in m}


def train_losses(run: Run) -> dict[int, float]:
    return metric_by_step(run, "train/loss")


def wait_for_checkpoint(run: Run, step: int, *, timeout_s: float = 600) -> None:
    """Wait until the run has a complete checkpoint of `step` or a later one."""
    deadline = time.monotonic() + timeout_s
    while not (newest := run.newest_checkpoint()) or newest[1]["position"]["step"] < step:
        assert time.monotonic() < deadline, f"no checkpoint of step {step} after {timeout_s} s"
        time.sleep(0.05)


def attempts(run: Run) -> set[int]:
    lines = run.folder.read_text("metrics.jsonl").splitlines()
    return {int(line.split('"attempt": ')[1].split(",")[0]) for line in lines}


def first_step(run: Run, *, attempt: int) -> int:
    return min(m["step"] for m in run.metrics() if m["attempt"] == attempt)


def continuation_lines(printed: str) -> list[str]:
    """Return the lines that report a resumed attempt."""
    return [line for line in printed.splitlines() if "continues after step" in line]


@pytest.fixture(scope="module")
def killed_run(
    ray_session: None, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Start the same run as `pretrained`, kill all its processes and return the run directory."""
    folder = tmp_path_factory.mktemp("killed")
    config = pretrain_config(folder / "run", tiny_corpus)
    command = [sys.executable, "-m", "medgpt", "pretrain"]
    driver = subprocess.Popen(
        [*command, str(write_toml(config, folder / "config.toml"))],
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for_checkpoint(Run(config.run.dir), KILL_AFTER_STEP)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    time.sleep(2)  # Ray ends the workers of a driver that is gone
    run = Run(config.run.dir)
    assert not run.finished
    assert not run.model.exists("manifest.json")
    return folder / "run"


@pytest.fixture
def copied_run(killed_run: Path, tmp_path: Path) -> Path:
    """Copy the killed run to its own folder, to be resumed."""
    folder = Path(shutil.copytree(killed_run, tmp_path / "run"))
    config = (folder / "config.toml").read_text("utf-8")
    (folder / "config.toml").write_text(config.replace(str(killed_run), str(folder)), "utf-8")
    return folder


def test_a_killed_run_resumes_with_the_losses_of_an_uninterrupted_one(
    pretrained: Run, copied_run: Path, tiny_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_pretrain(pretrain_config(copied_run, tiny_corpus))
    assert continuation_lines(capsys.readouterr().out) == [
        f"pretrain: attempt 2 continues after step {first_step(run, attempt=2) - 1}, with 2 workers"
    ]
    assert run.finished
    assert run.manifest["attempt"] == 2
    assert attempts(run) == {1, 2}
    times = [m["time_s"] for m in run.metrics()]
    assert times == sorted(times)  # training time, without the pause
    first = next(m for m in run.metrics() if m["attempt"] == 2 and "train/loss" in m)
    assert first["time/restore_s"] > 0
    assert train_losses(run) == pytest.approx(train_losses(pretrained), abs=1e-6)
    assert chunks_by_step(run) == chunks_by_step(pretrained)
    assert_every_chunk_once(run)


def test_worker_count_micro_batches_and_partitions_do_not_change_the_losses(
    pretrained: Run, copied_run: Path, tiny_corpus: Path
) -> None:
    config = pretrain_config(
        copied_run,
        tiny_corpus,
        cluster={"num_workers": 1},
        train={"micro_batch_size": 8, "log_every": 5},
        engine={"zero_stage": 0},
    )
    newest = Run(str(copied_run)).newest_checkpoint()
    assert newest is not None
    _truncate(Path(newest[0].url) / "rank-00001-of-00002.safetensors")
    run = run_pretrain(config)
    assert run.manifest["world_size"] == 1
    resumed_at = first_step(run, attempt=2)
    assert resumed_at == newest[1]["position"]["step"] - 10 + 1  # the damaged checkpoint is ignored
    assert train_losses(run) == pytest.approx(train_losses(pretrained), abs=1e-4)
    assert_every_chunk_once(run)  # the ten steps done twice count once
    assert chunks_by_step(run) == chunks_by_step(pretrained)


def test_a_killed_worker_is_replaced_and_every_chunk_is_trained_once(
    pretrained: Run, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = pretrain_config(tmp_path / "run", tiny_corpus)
    run = Run(config.run.dir)
    pids: list[int] = []

    def kill_one() -> None:
        wait_for_checkpoint(run, KILL_AFTER_STEP)
        pids.extend(worker_pids())
        os.kill(pids[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    run_pretrain(config)
    killer.join()
    assert len(pids) == 2
    assert run.manifest["attempt"] == 2
    assert continuation_lines(capsys.readouterr().out) == [
        "pretrain: workers were lost or replaced; attempt 2 continues after step "
        f"{first_step(run, attempt=2) - 1}, with 2 workers"
    ]
    assert train_losses(run) == pytest.approx(train_losses(pretrained), abs=1e-6)
    assert_every_chunk_once(run)
    assert chunks_by_step(run) == chunks_by_step(pretrained)


def test_a_checkpoint_without_manifest_or_with_a_short_file_is_ignored(
    copied_run: Path,
) -> None:
    run = Run(str(copied_run))
    first = run.newest_checkpoint()
    assert first is not None
    position = first[1]["position"]["step"]
    shutil.copytree(first[0].url, copied_run / "checkpoints/step-00009000")
    (copied_run / "checkpoints/step-00009000/manifest.json").unlink()
    again = run.newest_checkpoint()
    assert again is not None
    assert again[0].url == first[0].url
    _truncate(Path(first[0].url) / "rank-00000-of-00002.safetensors")
    second = run.newest_checkpoint()
    assert second is not None
    assert second[1]["position"]["step"] == position - 10


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("optimizer", {"learning_rate": 1e-3}, "optimizer.learning_rate was 0.005, is 0.001"),
        ("train", {"epochs": 3}, "train.epochs was 2, is 3"),
        ("data", {"max_length": 32}, "data.max_length was 64, is 32"),
        ("run", {"seed": 5}, "run.seed was 1, is 5"),
    ],
)
def test_a_changed_key_that_alters_training_is_refused_unless_allowed(
    copied_run: Path, tiny_corpus: Path, section: str, change: dict, message: str
) -> None:
    config = pretrain_config(copied_run, tiny_corpus, **{section: change})
    with pytest.raises(ConfigError) as error:
        run_pretrain(config)
    assert message in str(error.value)
    assert "accept with run.allow_changes=true" in str(error.value)
    run = Run.open("pretrain", config, run_dir=str(copied_run), allow_changes=True)
    assert run.config[section] | change == run.config[section]


def test_a_run_continues_with_an_allowed_change(
    pretrained: Run, copied_run: Path, tiny_corpus: Path
) -> None:
    config = pretrain_config(
        copied_run,
        tiny_corpus,
        run={"allow_changes": True},
        optimizer={"learning_rate": 1e-3},
    )
    run = run_pretrain(config)
    assert run.finished
    assert run.config["optimizer"]["learning_rate"] == 1e-3
    resumed_at = first_step(run, attempt=2)
    before, rates = (metric_by_step(r, "train/learning_rate") for r in (pretrained, run))
    ratios = {step: rates[step] / before[step] for step in before}
    assert ratios == pytest.approx({step: 0.2 if step >= resumed_at else 1.0 for step in before})
    expected, losses = train_losses(pretrained), train_losses(run)
    assert losses[resumed_at] == pytest.approx(expected[resumed_at], abs=1e-6)  # the same weights
    assert abs(losses[resumed_at + 1] - expected[resumed_at + 1]) > 1e-6  # another step from them
    assert_every_chunk_once(run)


def test_workers_micro_batches_and_logging_may_change(copied_run: Path, tiny_corpus: Path) -> None:
    config = pretrain_config(
        copied_run,
        tiny_corpus,
        cluster={"num_workers": 4, "wait_s": 5},
        train={"micro_batch_size": 1, "log_every": 1, "checkpoint_every": 7},
        report={"prompts": ("a",)},
        engine={"zero_stage": 3},
    )
    assert Run.open("pretrain", config, run_dir=str(copied_run), allow_changes=False)


def _truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def worker_pids() -> list[int]:
    """Return the ids of the training workers of this process's Ray, oldest first."""
    started_pids = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # ended meanwhile
            if any("RayTrainWorker" in word for word in process.cmdline()):
                started_pids.append((process.create_time(), process.pid))
    return [pid for _, pid in sorted(started_pids)]

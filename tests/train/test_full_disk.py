"""A full disk ends a run with a helpful error, and earlier checkpoints stay usable."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from medgpt.config.base import ConfigError
from medgpt.runs import Run
from medgpt.stages import train
from medgpt.stages.train import run_pretrain
from tests.train.audit_log import assert_every_chunk_once
from tests.train.fault_injection import FaultPoint, run_ranks
from tests.train.test_faults import CHECKPOINT_EVERY, UninterruptedRun, rank_logs, uninterrupted
from tests.train.test_resume import train_losses
from tests.train.tiny_configs import pretrain_config

__all__ = ["uninterrupted"]  # a fixture
pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


def mount_tmpfs(folder: Path, kib: int, *, remount: bool = False) -> None:
    options = f"{'remount,' if remount else ''}size={kib}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount an empty file system; `mount_tmpfs(..., remount=True)` sets its size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount_tmpfs(folder, 1024)
    except (subprocess.CalledProcessError, FileNotFoundError):
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def used_kib(folder: Path) -> int:
    """Return the KiB of all files, each rounded up to pages."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sum(-(-path.stat().st_size // 4096) * 4 for path in files)


def test_a_full_disk_at_a_checkpoint_keeps_the_previous_one(
    pretrained: Run, small_disk: Path, tiny_corpus: Path
) -> None:
    complete_run = Path(pretrained.folder.url)
    step = pretrained.checkpoint_steps()[-1]
    checkpoint = used_kib(Path(pretrained.checkpoint(step).url))
    rest = (
        used_kib(complete_run)
        - used_kib(complete_run / "checkpoints")
        - used_kib(complete_run / "model")
    )
    mount_tmpfs(small_disk, rest + 5 * checkpoint // 2, remount=True)  # room for two and a half
    config = pretrain_config(small_disk / "run", tiny_corpus)
    run = Run(config.run.dir)
    with pytest.raises(ConfigError) as error:
        run_pretrain(config)
    assert str(error.value) == (
        f"run.dir={run.folder.url}: No space left on device while writing "
        "checkpoints/step-00000030; free space and repeat the command, and the run continues from "
        "its newest complete checkpoint"
    )
    newest = run.newest_checkpoint()
    assert newest is not None
    assert newest[1]["position"]["step"] == 20
    assert run.checkpoint_steps() == [10, 20]  # what was half written is gone
    assert run.manifest["attempt"] == 1  # and nothing was tried again

    mount_tmpfs(small_disk, 64 * 1024, remount=True)
    assert run_pretrain(config).finished
    assert_every_chunk_once(run)
    assert train_losses(run) == pytest.approx(train_losses(pretrained), abs=1e-6)


def test_a_full_disk_during_data_preparation_is_a_config_error(
    ray_session: None, small_disk: Path, tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "EAGER_START_MAX_BYTES", 0)  # the barrier could not end the workers
    mount_tmpfs(small_disk, 60, remount=True)
    with pytest.raises(ConfigError, match="No space left on device while writing data; free space"):
        run_pretrain(pretrain_config(small_disk / "run", tiny_corpus))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_write_its_part_stops_all_ranks(
    uninterrupted: UninterruptedRun, tmp_path: Path, rank: int
) -> None:
    shutil.copytree(uninterrupted.prepared, tmp_path / "run")
    config = uninterrupted.config(tmp_path / "run")
    run = Run(config.run.dir)
    folder = f"checkpoints/step-{2 * CHECKPOINT_EVERY:08d}"
    point = next(p for p in uninterrupted.points if p.rank == rank and p.what.endswith(folder[12:]))
    limit = FaultPoint(
        rank, "full", point.index, point.what
    )  # a file may not grow, as on a full disk
    assert run_ranks(config, tmp_path, limit) == [1, 1]
    assert rank_logs(tmp_path).count(f"File too large while writing {folder}; free space") == 2
    assert run.checkpoint_steps() == [CHECKPOINT_EVERY]
    assert run_ranks(config, tmp_path) == [0, 0], rank_logs(tmp_path)
    assert train_losses(run) == pytest.approx(uninterrupted.losses, abs=1e-6)

"""When an S3 server crashes, uploads are complete or absent, and runs resume later."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from medgpt.artifacts import Folder, commit, committed, file_entries
from medgpt.config.base import ConfigError
from medgpt.config.loading import validate
from medgpt.config.stages import PretrainConfig
from medgpt.disk import storage_errors
from medgpt.engine.checkpoint import Snapshot
from medgpt.runs import Run
from tests.train.audit_log import assert_every_chunk_once
from tests.train.crashing_store import CrashingStore
from tests.train.fault_injection import run_ranks
from tests.train.test_faults import (
    CHECKPOINT_EVERY,
    UninterruptedRun,
    make_config,
    rank_logs,
    uninterrupted,
)
from tests.train.test_resume import train_losses
from tests.train.tiny_configs import pretrain_settings, write_toml

__all__ = ["uninterrupted"]  # a fixture
pytestmark = pytest.mark.timeout(900)
BUCKET = "s3://dying"
MULTIPART_BYTES = 100 * 2**20  # above it s3fs sends a file in parts


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[CrashingStore]:
    """Start a server with an empty bucket, which this process also uses."""
    server = CrashingStore()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    if fs.exists(BUCKET):
        fs.rm(BUCKET, recursive=True)
    fs.mkdir(BUCKET)
    yield server
    server.stop()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def write_large_checkpoint(folder: Folder, value: float) -> None:
    """Write a checkpoint of one rank that needs a multipart upload."""
    tensors = {"weight/x": torch.full((MULTIPART_BYTES // 4 + 1,), value)}
    snapshot = Snapshot(tensors, 0, 1, {"steps": 1, "adam_steps": 1})
    with folder.staging() as directory:
        files = file_entries(directory, snapshot.write(directory))
    commit(folder, files)


def test_a_partial_multipart_upload_is_no_checkpoint(
    store: CrashingStore,
) -> None:
    first, second = Folder(f"{BUCKET}/run/step-1"), Folder(f"{BUCKET}/run/step-2")
    write_large_checkpoint(first, 1.0)
    name = "rank-00000-of-00001.safetensors"
    assert first.size(name) > MULTIPART_BYTES
    assert "-" in first.fs.info(first.path(name))["ETag"]  # S3 marks multipart uploads so
    assert committed(first, verify=True) is not None

    store.crash_on_upload = f"step-2/{name}?partNumber=2"
    with (
        pytest.raises(ConfigError, match=r"run.dir=s3://dying/run: the store does not answer"),
        storage_errors(f"{BUCKET}/run", "checkpoints/step-2"),
    ):
        write_large_checkpoint(second, 2.0)
    store.start()
    assert not second.exists(name)
    assert committed(second) is None
    assert committed(first, verify=True) is not None
    write_large_checkpoint(second, 2.0)
    assert committed(second, verify=True) is not None


@pytest.mark.ray
@pytest.mark.parametrize("where", ["rank-00001", "manifest.json"])
def test_a_store_that_dies_at_a_checkpoint_keeps_the_previous_one(
    store: CrashingStore, uninterrupted: UninterruptedRun, tmp_path: Path, where: str
) -> None:
    run = Run(f"{BUCKET}/run")
    run.folder.fs.put(f"{uninterrupted.prepared}/", f"{run.folder.root}/", recursive=True)
    config = make_config(tmp_path, uninterrupted.corpus)
    tree = config.model_dump() | {"run": config.run.model_dump() | {"dir": run.folder.url}}
    config = validate(PretrainConfig, tree)
    step = f"checkpoints/step-{2 * CHECKPOINT_EVERY:08d}"
    store.crash_on_upload = f"{step}/{where}"
    assert run_ranks(config, tmp_path, environment=store.environment) == [1, 1], rank_logs(tmp_path)
    assert rank_logs(tmp_path).count("the store does not answer (") >= 2
    assert f"at {step}; repeat the command when it does" in rank_logs(tmp_path)
    store.start()
    newest = run.newest_checkpoint()
    assert newest is not None
    assert newest[1]["position"]["step"] == CHECKPOINT_EVERY
    assert run_ranks(config, tmp_path, environment=store.environment) == [0, 0], rank_logs(tmp_path)
    assert train_losses(run) == pytest.approx(uninterrupted.losses, abs=1e-6)
    assert_every_chunk_once(run)


@pytest.mark.ray
@pytest.mark.slow
def test_a_command_whose_store_dies_fails_clearly_and_resumes_when_repeated(
    store: CrashingStore, tiny_corpus: Path, tmp_path: Path
) -> None:
    tree = pretrain_settings(Path("unused"), tiny_corpus)
    tree["run"]["dir"] = f"{BUCKET}/run"
    tree["train"]["epochs"] = 1
    toml = write_toml(validate(PretrainConfig, tree), tmp_path / "config.toml")
    run = Run(f"{BUCKET}/run")

    def command() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "medgpt", "pretrain", str(toml)],
            env={**os.environ, "RAY_ADDRESS": ""},
            capture_output=True,
            text=True,
            timeout=300,
        )

    store.crash_on_upload = "checkpoints/step-00000010/rank-00000"
    failed = command()
    assert failed.returncode != 0
    assert "run.dir=s3://dying/run: the store does not answer" in failed.stdout + failed.stderr
    assert "Traceback" not in failed.stdout + failed.stderr
    store.start()
    assert run.newest_checkpoint() is None
    done = command()
    assert done.returncode == 0, done.stdout + done.stderr
    assert run.finished
    assert_every_chunk_once(run)
    assert json.loads(run.folder.read_text("manifest.json"))["attempt"] >= 2

"""The package of a job contains code and configs, but no data, runs, history or secrets."""

import os
from pathlib import Path

import pytest

from medgpt.config.base import ConfigError
from medgpt.jobs import package
from medgpt.jobs.package import package_working_dir

STAYS = [
    *(".git/config", ".env", ".env.local", "deep/.env", ".netrc", "keys/me.pem", "id_rsa"),
    *("runs/sft/metrics.jsonl", "data/patients.jsonl", ".venv/bin/python", ".venv-gpu/x"),
    *("a/__pycache__/b.pyc", ".pytest_cache/x", ".aws/credentials", "ignored/x", "big.parquet"),
]
TRAVELS = [
    *("medgpt/data/sources/clean.py", "medgpt/runs.py", "configs/sft.toml", "my_rewards.py"),
    *("rules/deny.toml", "environment.py"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in [*STAYS, *TRAVELS]:
        path = tmp_path / "work" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "work/.gitignore").write_text("ignored/\n")
    (tmp_path / "work/.rayignore").write_text("*.parquet\n")
    return tmp_path / "work"


def test_only_code_and_configs_are_packaged(folder: Path, tmp_path: Path) -> None:
    names = package_working_dir(folder, tmp_path / "code.zip")
    files = {name for name in names if not name.endswith("/")}
    assert files == {*TRAVELS, ".gitignore", ".rayignore"}


def test_this_checkout_can_be_packaged(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    names = package_working_dir(root, tmp_path / "code.zip")
    assert {"medgpt/cli.py", "medgpt/data/sources/clean.py", "configs/debug/sft.toml"} <= names
    assert not any(name.startswith((".git/", ".venv", "runs/")) for name in names)


def test_a_package_that_is_too_large_is_refused_with_its_largest_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "weights.safetensors").write_bytes(os.urandom(3 * 2**20))
    monkeypatch.setattr(package, "MAX_PACKAGE_MB", 2)
    with pytest.raises(ConfigError, match=r"weights\.safetensors \(3 MiB\); name in \.rayignore"):
        package_working_dir(folder, tmp_path / "code.zip")

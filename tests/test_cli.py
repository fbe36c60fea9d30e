"""The command line responds quickly and without tracebacks."""

import os
import re
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medgpt.cli import app

ROOT = Path(__file__).parent.parent
STAGES = ("corpus", "pretrain", "sft", "eval", "pipeline", "chat", "merge")


def medgpt(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "medgpt", *arguments]
    environment = {**os.environ, "COLUMNS": "200", **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def cpu_seconds(arguments: Sequence[str]) -> float:
    """Return the median CPU time of three runs; wall time depends on the load of the machine."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    taken = []
    for _ in range(3):
        before = used()
        medgpt(*arguments)
        taken.append(used() - before)
    return statistics.median(taken)


def test_help_names_every_stage() -> None:
    result = medgpt("--help")
    assert result.returncode == 0
    for stage in STAGES:
        assert f" {stage} " in result.stdout


def test_help_groups_the_commands() -> None:
    panels = re.split(r"─ (Train|Evaluate|Cluster) ─", medgpt("--help").stdout)[1:]
    commands = {
        name: re.findall(r"^│ (\w+) ", panel, re.MULTILINE)
        for name, panel in zip(panels[::2], panels[1::2], strict=True)
    }
    assert commands == {
        "Train": ["corpus", "pretrain", "sft", "reward", "dpo", "ppo", "tune", "pipeline"],
        "Evaluate": ["eval", "chat", "merge"],
        "Cluster": ["plan", "submit", "job"],
    }


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["pretrain", "configs/debug/pretrain.toml", "train.epoch=2"]],
    ids=["help", "config error"],
)
def test_help_and_a_config_error_answer_in_under_a_second(arguments: list[str]) -> None:
    assert cpu_seconds(arguments) < 1


def test_a_config_error_is_one_line_with_exit_status_2() -> None:
    result = medgpt("pretrain", "configs/debug/pretrain.toml", "train.epoch=2")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        "medgpt: configs/debug/pretrain.toml: unknown key train.epoch; did you mean train.epochs?\n"
    )


def test_a_missing_config_file_is_a_config_error() -> None:
    result = medgpt("sft", "configs/none.toml")
    assert result.returncode == 2
    assert result.stderr == (
        "medgpt: configs/none.toml: no such file; configs/ has one for each stage\n"
    )


def test_an_error_names_its_subject_once() -> None:
    plan = ("plan", "sft", "configs/sft.toml", "--cluster", "none.yaml")
    assert medgpt(*plan).stderr == (
        "medgpt: --cluster=none.yaml cannot be read (No such file or directory); see clusters/\n"
    )
    assert medgpt("job", "stop", "x", "--address", "host").stderr.startswith(
        "medgpt: --address host: give the URL"
    )


def test_an_unknown_stage_is_refused_without_a_traceback() -> None:
    result = medgpt("pretrian", "configs/debug/pretrain.toml")
    assert result.returncode == 2
    assert "No such command 'pretrian'" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_bucket_without_credentials_is_refused_without_a_traceback(tmp_path: Path) -> None:
    nobody = {
        "AWS_ACCESS_KEY_ID": "",
        "AWS_SECRET_ACCESS_KEY": "",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
    }
    config = "configs/debug/pretrain.toml"
    result = medgpt("pretrain", config, "run.dir=s3://bucket/run", **nobody)
    assert result.returncode == 2
    assert "run.dir=s3://bucket/run: Unable to locate credentials" in result.stderr
    assert "Traceback" not in result.stderr
    data = 'data.sources.0.paths=["s3://bucket/data"]'
    result = medgpt("pretrain", config, f"run.dir={tmp_path}/run", data, **nobody)
    assert result.returncode == 2
    assert "paths='s3://bucket/data': cannot be listed (Unable to locate cred" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("exists", [True, False], ids=["empty folder", "no folder"])
def test_chat_without_a_model_says_what_to_give(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "run"
    folder.mkdir() if exists else None
    result = CliRunner().invoke(app, ["chat", str(folder)])
    assert result.exit_code == 2
    assert result.stderr == (
        f"medgpt: no model in {folder}; give a finished run or its model folder\n"
        if exists
        else f"medgpt: RUN={folder}: no such folder; give a finished run or a model folder\n"
    )


def test_merge_of_a_run_without_adapters_says_which_runs_have_them(tmp_path: Path) -> None:
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/model/config.json").write_text("{}")
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["merge", str(tmp_path / "run"), str(out)])
    assert result.exit_code == 2
    assert "name a run trained with model.lora.rank > 0" in result.stderr
    assert not out.exists()


def test_merge_never_writes_into_a_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    result = CliRunner().invoke(app, ["merge", str(tmp_path), str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "exists and is not empty" in result.stderr
    assert os.listdir(tmp_path / "out") == ["mine.txt"]

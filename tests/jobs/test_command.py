"""A resolved command has the same meaning on the cluster, or is refused on the laptop."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from medgpt.config.base import ConfigError
from medgpt.config.loading import load
from medgpt.jobs.command import SUBMITTABLE_CONFIGS, resolve_command

SFT = """
run.dir = "/shared/runs/sft"
model.name = "runs/base/model"
[[data.sources]]
name = "a"
paths = ["corpora/*.jsonl", "/shared/b.jsonl", "s3://bucket/c.jsonl"]
license = "MIT"
deny = ["default", "rules.toml"]
"""
PPO = """
run.dir = "runs/ppo"
model.name = "runs/base/model"
ppo.max_iterations = 4
judge = { every = 2, key_points = "held_out.jsonl" }
reward.score_weight = 0.0
[[data.sources]]
name = "a"
paths = ["prompts/*.jsonl"]
license = "MIT"
"""
TUNE = """
run.dir = "/shared/runs/tune"
base = "configs/ppo.toml"
overrides = ["ppo.rollout_batch_size=256"]
search.ppo.kl_coef.loguniform = [0.01, 0.1]
"""
PIPELINE = """
run.dir = "/shared/runs/all"
[[stages]]
stage = "corpus"
config = "configs/corpus.toml"
overrides = ["run.dir={dir}/corpus"]
[[stages]]
stage = "sft"
config = "configs/sft.toml"
overrides = ["run.dir={dir}/sft", "model.name={dir}/base"]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with configs and a model."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "runs/base/model").mkdir(parents=True)
    (tmp_path / "configs/sft.toml").write_text(SFT)
    (tmp_path / "configs/corpus.toml").write_text("")
    (tmp_path / "configs/pipeline.toml").write_text(PIPELINE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def resolve_elsewhere(
    stage: str, arguments: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Load the config of a resolved command in another folder with the same config files."""
    copy = folder / "copy"
    copy.mkdir()
    (copy / "configs").symlink_to(folder / "configs")
    monkeypatch.chdir(copy)
    return load(SUBMITTABLE_CONFIGS[stage], Path(arguments[1]), arguments[2:])


def test_relative_paths_become_absolute(here, monkeypatch) -> None:
    command = resolve_command("sft", Path("configs/sft.toml"), ["train.epochs=2"])
    assert command.config_files == ("configs/sft.toml",)
    config = resolve_elsewhere("sft", command.cli_arguments, here, monkeypatch)
    assert config == command.config
    assert config.data.sources[0].paths[0] == f"{here}/corpora/*.jsonl"
    assert config.data.sources[0].deny == ("default", f"{here}/rules.toml")
    assert config.model.name == f"{here}/runs/base/model"
    assert config.train.epochs == 2


def test_absolute_paths_are_unchanged(here) -> None:
    overrides = ["model.name=/models/base", "data.sources.0.paths=['s3://b/a']"]
    overrides += ["data.sources.0.deny=[]"]
    command = resolve_command("sft", Path("configs/sft.toml"), overrides)
    assert command.cli_arguments == ("sft", "configs/sft.toml", *overrides)


def test_a_pipeline_reads_its_configs_from_the_package_and_data_by_absolute_paths(
    here, monkeypatch
) -> None:
    command = resolve_command("pipeline", Path("configs/pipeline.toml"), [])
    files = ["configs/pipeline.toml", "configs/corpus.toml", "configs/sft.toml"]
    assert list(command.config_files) == files
    assert [config.run.dir for config in command.configs] == [
        "/shared/runs/all/corpus",
        "/shared/runs/all/sft",
    ]
    assert command.configs[1].model.name == "/shared/runs/all/base"
    pipeline = resolve_elsewhere("pipeline", command.cli_arguments, here, monkeypatch)
    assert pipeline.stages[1].config == f"{here}/copy/configs/sft.toml"
    assert f'data.sources.0.deny=["default", "{here}/rules.toml"]' in pipeline.stages[1].overrides
    assert pipeline.stages[0] == command.config.stages[0].model_copy(
        update={"config": f"{here}/copy/configs/corpus.toml"}
    )


def test_a_search_reads_its_base_from_the_package_and_data_by_absolute_paths(
    here, monkeypatch
) -> None:
    (here / "configs/ppo.toml").write_text(PPO)
    (here / "configs/tune.toml").write_text(TUNE)
    command = resolve_command("tune", Path("configs/tune.toml"), ["tune.num_trials=3"])
    assert command.config_files == ("configs/tune.toml", "configs/ppo.toml")
    there = resolve_elsewhere("tune", command.cli_arguments, here, monkeypatch)
    assert there.base_config == command.config.base_config
    assert there.base_config.model.name == str(here / "runs/base/model")
    assert there.base_config.run.dir == "/shared/runs/tune/base"
    assert there.tune.num_trials == 3
    assert there.base == str(here / "copy/configs/ppo.toml")


def test_an_evaluation_passes_its_model_as_an_argument(here) -> None:
    (here / "configs/eval.toml").write_text("run.dir = '/shared/e'\n[[nll]]\ngeneral = true\n")
    path = Path("configs/eval.toml")
    command = resolve_command("eval", path, ["model.name=runs/base/model"])
    assert command.cli_arguments[:3] == ("eval", f"{here}/runs/base/model", "configs/eval.toml")
    with pytest.raises(ConfigError, match=r"missing key model\.name"):
        resolve_command("eval", path, [])


@pytest.mark.parametrize(
    ("stage", "path", "overrides", "words"),
    [
        ("sft", "configs/sft.toml", ["run.dir=runs/x"],
         r"run\.dir='runs/x': a submitted job needs an absolute path or URI"),
        ("pipeline", "configs/pipeline.toml", ["stages.1.overrides=['run.dir=runs/y']"],
         r"run\.dir='runs/y': a submitted job needs"),
        ("sft", "configs/sft.toml", ["train.epoch=2"], r"did you mean train\.epochs"),
        ("sft", "/etc/hostname", [], "is not a TOML file"),
        ("sfd", "configs/sft.toml", [], "stage sfd cannot be submitted; did you mean sft"),
        ("chat", "configs/sft.toml", [], "stage chat cannot be submitted"),
        ("sft", "configs/sft.toml", ["data.sources.0.paths=['s3://me:secret@b/a']"],
         r"'s3://me:\*\*\*@b/a': a URI must not contain a password"),
    ],
)  # fmt: skip
def test_commands_that_cannot_work_on_a_cluster_are_refused(
    here, stage, path, overrides, words
) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        resolve_command(stage, Path(path), overrides)
    assert "secret" not in str(error.value)


def test_a_config_outside_of_the_folder_is_refused(here, tmp_path_factory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "sft.toml"
    elsewhere.write_text(SFT)
    with pytest.raises(ConfigError, match=r"is outside of .* put it inside"):
        resolve_command("sft", elsewhere, [])


def test_a_command_is_resolved_without_heavy_libraries() -> None:
    heavy = {"torch", "ray", "numpy", "pyarrow", "transformers"}
    code = f"import medgpt.jobs.command, sys; print(*{heavy!r} & set(sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (process.returncode, process.stdout.strip()) == (0, ""), process.stderr

"""Every shipped config is valid for its stage."""

import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from medgpt.config.loading import load
from medgpt.config.stages import PipelineConfig, TrainStageConfig
from medgpt.reference import STAGES
from medgpt.stages.pipeline import load_stages

ROOT = Path(__file__).parent.parent
CLASSES = {**STAGES, "quickstart": PipelineConfig}  # by the first word of the file's name
FILES = sorted((ROOT / "configs").rglob("*.toml"))


def load_shipped(path: Path) -> BaseModel:
    return load(CLASSES[path.stem.split("-")[0]], path)


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_config_loads_and_starts_with_a_comment(path: Path) -> None:
    load_shipped(path)
    assert path.read_text("utf-8").startswith("# ")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_config_writes_to_runs(path: Path) -> None:
    run = tomllib.loads(path.read_text("utf-8"))["run"]
    assert run["dir"].startswith(("runs/", "/shared/")) or "://" in run["dir"]


def test_no_two_configs_share_a_run_directory() -> None:
    folders = [tomllib.loads(path.read_text("utf-8"))["run"]["dir"] for path in FILES]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("path", [p for p in FILES if p.stem == "quickstart"], ids=str)
def test_the_stages_of_a_pipeline_load_with_their_overrides(path: Path) -> None:
    pipeline = load_shipped(path)
    assert isinstance(pipeline, PipelineConfig)
    for stage in load_stages(pipeline):
        assert stage.config.run.dir.startswith(pipeline.run.dir)


@pytest.mark.parametrize("path", (ROOT / "configs" / "debug").glob("*.toml"), ids=lambda p: p.name)
def test_a_debug_config_runs_on_two_cores_without_a_model_hub(path: Path) -> None:
    config = load_shipped(path)
    if isinstance(config, TrainStageConfig):
        cluster = config.cluster
        assert cluster.num_workers * cluster.cpus_per_worker <= 2
        assert not cluster.gpus_per_worker
        assert config.model.name is None or Path(config.model.name).is_absolute()

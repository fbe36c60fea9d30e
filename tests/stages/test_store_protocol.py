"""Stages whose run directory is in a store that fsspec knows and pyarrow does not, as oss://."""

from pathlib import Path

import pytest

from medgpt.artifacts import Folder, committed
from medgpt.config.evaluation import EvalConfig, NllConfig
from medgpt.config.loading import load, validate
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.stages import PipelineConfig, PipelineStage, RunConfig
from medgpt.runs import Run
from medgpt.stages.evaluate import run_eval
from medgpt.stages.pipeline import run_pipeline
from medgpt.stages.ppo import run_ppo
from medgpt.stages.train import run_pretrain
from medgpt.stages.tune import run_tune
from tests.train.tiny_configs import pretrain_config, sft_config, source_settings, write_toml
from tests.tune.cases import search_config

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
SHORT = {"max_steps": 2, "checkpoint_every": 1, "eval_every": 2, "audit": True}


@pytest.fixture(scope="module")
def trained(ray_session: None, shelf: str, tiny_corpus: Path) -> Run:
    """A pretraining that reads its rows from the store, too."""
    corpus = Folder(f"{shelf}/corpus")
    corpus.fs.put(f"{tiny_corpus}/", f"{corpus.root}/", recursive=True)
    source = source_settings("documents", Path("unused")) | {"paths": [f"{corpus.url}/pretrain"]}
    return run_pretrain(
        pretrain_config(
            Path("/unused"),
            tiny_corpus,
            run={"dir": f"{shelf}/pretrain"},
            data={"sources": [source]},
            train=SHORT,
            cluster={"num_workers": 1},
        )
    )


def test_training_writes_a_complete_run(trained: Run) -> None:
    assert trained.finished
    assert [line["step"] for line in trained.metrics() if "train/loss" in line] == [1, 2]
    newest = trained.newest_checkpoint()
    assert newest is not None
    assert newest[0].name == "step-00000002"
    assert committed(trained.model, verify=True) is not None
    assert {"report.html", "audit", "plan"} <= set(trained.folder.names())


@pytest.mark.slow
def test_a_pipeline_writes_the_runs_of_its_stages(
    trained: Run, shelf: str, base: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = sft_config(Path("/unused"), tiny_corpus, base, train=SHORT, cluster={"num_workers": 1})
    stage = PipelineStage(
        stage="sft",
        config=str(write_toml(config, tmp_path / "sft.toml")),
        overrides=("run.dir={dir}/sft", f"model.name={trained.model.url}"),
    )
    pipeline = PipelineConfig(run=RunConfig(dir=f"{shelf}/pipeline"), stages=(stage,))
    assert run_pipeline(pipeline).manifest["runs"] == {"sft": f"{shelf}/pipeline/sft"}


@pytest.mark.slow
def test_an_evaluation_writes_its_run(trained: Run, shelf: str) -> None:
    tree = {"run": {"dir": f"{shelf}/eval"}, "model": {"name": trained.model.url}}
    config = validate(EvalConfig, tree | {"nll": [NllConfig(general=True, limit=4)]})
    assert run_eval(config).folder.exists("results.json")


@pytest.mark.slow
def test_a_search_writes_its_run_and_those_of_its_trials(
    ray_session: None, shelf: str, base: Path, tmp_path: Path
) -> None:
    config = search_config(
        tmp_path, base, f"run.dir={shelf}/search", "tune.num_trials=2", "tune.max_concurrent=1",
        of_base=f'["run.dir={shelf}/alone", "ppo.max_iterations=2"]',
    )  # fmt: skip
    run = run_tune(config)
    assert run.folder.exists("results.parquet")
    assert (run.folder / "trials").names() >= ["001"]


@pytest.mark.slow
def test_ppo_writes_its_run(trained: Run, shelf: str, base: Path, tmp_path: Path) -> None:
    search_config(tmp_path, base)  # writes base.toml and its prompts
    overrides = [f"run.dir={shelf}/ppo", f"model.name={trained.model.url}", "ppo.max_iterations=2"]
    run = run_ppo(load(PPOStageConfig, tmp_path / "base.toml", overrides))
    assert committed(run.model, verify=True) is not None

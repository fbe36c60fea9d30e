from pathlib import Path
from typing import Literal

import pytest

from medgpt.config import ConfigError, PipelineConfig, PipelineStage, RunConfig
from medgpt.eval.pipeline import models_to_ask, read_stages, require_answers, run_pipeline
from medgpt.eval.questions import Answer
from medgpt.runs import Run, commit, entries

CONFIGS = Path(__file__).parent.parent.parent / "configs" / "debug"
MASKED = (  # what makes the debug pretraining one of masks
    "objective.kind=mlm",
    "model.architecture.kind=bert",
    "report.prompts=[]",
)


def stage(
    kind: Literal["corpus", "pretrain", "sft"], folder: str, *overrides: str
) -> PipelineStage:
    """The stage's debug config in a folder of the pipeline's."""
    return PipelineStage(
        stage=kind,
        config=str(CONFIGS / f"{kind}.toml"),
        overrides=(f"run.dir={{dir}}/{folder}", *overrides),
    )


def pipeline(folder: Path, *overrides: str) -> PipelineConfig:
    return pipeline_of(folder, stage("corpus", "corpus", *overrides))


def pipeline_of(folder: Path, *stages: PipelineStage) -> PipelineConfig:
    return PipelineConfig(run=RunConfig(dir=str(folder)), stages=stages)


def finish(config: PipelineConfig, number: int) -> None:
    """Leave the run directory of a stage as training does, with a model of one byte."""
    stage = read_stages(config)[number]
    run = Run.open(stage.kind, stage.config, run_dir=stage.config.run.dir, allow_changes=False)
    with run.model.staging() as directory:
        (directory / "model.safetensors").write_bytes(b"0")
        commit(run.model, entries(directory))
    run.folder.write_text("report.html", "")
    run.update_manifest(finished=True)


def test_a_pipeline_runs_its_stages_in_its_folder_and_reports(tmp_path, capsys):
    run = run_pipeline(pipeline(tmp_path))
    assert run.finished
    assert (tmp_path / "corpus" / "data" / "held_out.jsonl").exists()
    assert f"report in {tmp_path}/report.html" in capsys.readouterr().out
    before = (tmp_path / "report.html").stat().st_mtime_ns
    run_pipeline(pipeline(tmp_path))  # finished: nothing is written again
    assert (tmp_path / "report.html").stat().st_mtime_ns == before


def test_a_wrong_stage_config_is_named_before_anything_runs(tmp_path):
    with pytest.raises(
        ConfigError, match=r"stage corpus, .*corpus\.toml: unknown key shard; .*shards"
    ):
        run_pipeline(pipeline(tmp_path, "shard=2"))
    assert not any(tmp_path.iterdir())


def test_a_pipeline_of_another_config_is_refused(tmp_path):
    run_pipeline(pipeline(tmp_path))
    with pytest.raises(ConfigError, match=r"begun with another config.*shards=2"):
        run_pipeline(pipeline(tmp_path, "shards=2"))


def test_stages_of_one_kind_are_numbered_and_the_last_that_generates_is_asked(tmp_path):
    config = pipeline_of(
        tmp_path,
        stage("pretrain", "general"),
        stage("pretrain", "medical"),
        stage("pretrain", "masked", *MASKED),
        stage("sft", "sft"),
    )
    stages = read_stages(config)
    assert [each.name for each in stages] == ["pretrain", "pretrain-2", "pretrain-3", "sft"]
    asked = {kind: run.folder.url for kind, run in models_to_ask(stages).items()}
    assert asked == {"pretrain": f"{tmp_path}/medical", "sft": f"{tmp_path}/sft"}


def test_a_masked_model_is_trained_and_not_asked_to_generate(tmp_path):
    config = pipeline_of(
        tmp_path,
        stage("corpus", "corpus"),
        stage("pretrain", "one", *MASKED),
        stage("pretrain", "two", *MASKED),
    )
    Run.open("pipeline", config, run_dir=config.run.dir, allow_changes=False)
    finish(config, 1)
    finish(config, 2)
    run = run_pipeline(config)
    assert run.folder.read_json("answers.json") == []
    assert run.manifest["runs"] == {
        "corpus": f"{tmp_path}/corpus",
        "pretrain": f"{tmp_path}/one",
        "pretrain-2": f"{tmp_path}/two",
    }
    assert run.manifest["models"].keys() == {"pretrain", "pretrain-2"}


@pytest.mark.parametrize(
    ("folder", "other"), [("one", "stage pretrain"), (".", "the pipeline")], ids=["stage", "own"]
)
def test_stages_that_share_a_run_directory_are_refused_before_anything_runs(
    tmp_path, folder, other
):
    config = pipeline_of(tmp_path, stage("pretrain", "one"), stage("sft", folder))
    taken = Path(tmp_path, folder)
    with pytest.raises(ConfigError) as error:
        run_pipeline(config)
    assert str(error.value) == (
        f"stage sft: run.dir={taken} is that of {other}, too; give each stage its own"
    )
    assert not any(tmp_path.iterdir())


def answer(kind: str, *stated: bool) -> Answer:
    return Answer(kind, f"{kind}?", "", [["多饮"], ["多尿"]], list(stated))


def test_a_stage_must_have_learnt_its_answer():
    models = {"pretrain", "sft"}
    require_answers([answer("pretrain", True, True), answer("sft", True, True)], models)
    with pytest.raises(ConfigError, match=r"'sft\?' is not answered: the answer lacks 多尿"):
        require_answers([answer("sft", True, False)], models)


def test_only_the_answers_of_stages_that_ran_are_failures():
    kinds = ("rlhf", "phrasing", "pretrain", "sft")
    answers = [answer(kind, False, False) for kind in kinds]
    require_answers(answers, {"reward"})
    with pytest.raises(ConfigError) as error:
        require_answers(answers, {"sft", "rlhf", "phrasing"})
    assert str(error.value) == "'sft?' is not answered: the answer lacks 多饮, 多尿"


def test_knowing_what_was_left_out_is_a_failure():
    require_answers([answer("left_out", True, False)], ())
    with pytest.raises(ConfigError, match="although no training text tells it"):
        require_answers([answer("left_out", True, True)], ())

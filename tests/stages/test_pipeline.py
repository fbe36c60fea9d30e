from pathlib import Path
from typing import Literal

import pytest

from medgpt.artifacts import commit, file_entries
from medgpt.config.base import ConfigError
from medgpt.config.loading import load
from medgpt.config.stages import PipelineConfig, PipelineStage, RunConfig
from medgpt.eval.gates import GateFailure
from medgpt.runs import Run
from medgpt.stages.pipeline import load_stages, run_pipeline

CONFIGS = Path(__file__).parent.parent.parent / "configs" / "debug"
MASKED = (  # what makes the debug pretraining one of masks
    "objective.kind=mlm",
    "model.architecture.kind=bert",
    "report.prompts=[]",
)


def pipeline_stage(
    kind: Literal["corpus", "pretrain", "sft", "eval"], folder: str, *overrides: str
) -> PipelineStage:
    """Return a stage with its debug config in a folder of the pipeline."""
    return PipelineStage(
        stage=kind,
        config=str(CONFIGS / f"{kind}.toml"),
        overrides=(f"run.dir={{dir}}/{folder}", *overrides),
    )


def pipeline(folder: Path, *overrides: str) -> PipelineConfig:
    return pipeline_of(folder, pipeline_stage("corpus", "corpus", *overrides))


def pipeline_of(folder: Path, *stages: PipelineStage) -> PipelineConfig:
    return PipelineConfig(run=RunConfig(dir=str(folder)), stages=stages)


def mark_finished(config: PipelineConfig, number: int) -> None:
    """Write the finished run directory of a stage, with a model of one byte."""
    stage = load_stages(config)[number]
    run = Run.open(stage.kind, stage.config, run_dir=stage.config.run.dir, allow_changes=False)
    with run.model.staging() as directory:
        (directory / "model.safetensors").write_bytes(b"0")
        commit(run.model, file_entries(directory))
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
    with pytest.raises(ConfigError, match=r"began with another config.*shards=2"):
        run_pipeline(pipeline(tmp_path, "shards=2"))


def test_stages_of_one_kind_are_numbered(tmp_path):
    config = pipeline_of(
        tmp_path,
        pipeline_stage("pretrain", "general"),
        pipeline_stage("pretrain", "medical"),
        pipeline_stage("pretrain", "masked", *MASKED),
        pipeline_stage("sft", "sft"),
    )
    stages = load_stages(config)
    assert [each.name for each in stages] == ["pretrain", "pretrain-2", "pretrain-3", "sft"]


def test_a_finished_pipeline_records_its_runs(tmp_path):
    config = pipeline_of(
        tmp_path,
        pipeline_stage("corpus", "corpus"),
        pipeline_stage("pretrain", "one", *MASKED),
        pipeline_stage("pretrain", "two", *MASKED),
    )
    Run.open("pipeline", config, run_dir=config.run.dir, allow_changes=False)
    mark_finished(config, 1)
    mark_finished(config, 2)
    run = run_pipeline(config)
    assert run.manifest["runs"] == {
        "corpus": f"{tmp_path}/corpus",
        "pretrain": f"{tmp_path}/one",
        "pretrain-2": f"{tmp_path}/two",
    }


@pytest.mark.parametrize(
    ("folder", "other"), [("one", "stage pretrain"), (".", "the pipeline")], ids=["stage", "own"]
)
def test_stages_that_share_a_run_directory_are_refused_before_anything_runs(
    tmp_path, folder, other
):
    config = pipeline_of(tmp_path, pipeline_stage("pretrain", "one"), pipeline_stage("sft", folder))
    taken = Path(tmp_path, folder)
    with pytest.raises(ConfigError) as error:
        run_pipeline(config)
    assert str(error.value) == (
        f"stage sft: run.dir={taken} is also that of {other}; "
        "set a different run.dir for each stage"
    )
    assert not any(tmp_path.iterdir())


def evaluation_stage(
    folder: Path, base: Path, *gates: str, overrides: tuple[str, ...] = ()
) -> PipelineConfig:
    """Return a pipeline that scores the model in `base`, then writes the corpus."""
    evaluation = PipelineStage(
        stage="eval",
        name="scores",
        config=str(CONFIGS / "eval.toml"),
        overrides=("run.dir={dir}/scores", f"model.name={base}", *overrides),
    )
    stages = (evaluation, pipeline_stage("corpus", "corpus"))
    return PipelineConfig(run=RunConfig(dir=str(folder)), stages=stages, gates={"scores": gates})


def small(tmp_path: Path) -> tuple[str, ...]:
    """Return overrides that reduce an evaluation to general text and one question."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text(
        '{"kind": "q", "prompt": "高血压是", "key_points": [["没教过"]], "condition": "x"}\n',
        "utf-8",
    )
    return (
        *("mcq=[]", "triage=[]", "safety=[]", "cluster.num_workers=1"),
        "nll=[{general = true, limit = 2}]",
        f'key_points=[{{path = "{questions}", prompt = "plain", max_new_tokens = 4}}]',
    )


def test_overrides_for_a_kind_apply_before_those_of_a_stage(tmp_path):
    config = pipeline_of(
        tmp_path,
        pipeline_stage("corpus", "corpus"),
        pipeline_stage("pretrain", "one"),
        pipeline_stage("pretrain", "two", "train.epochs=9"),
    ).model_copy(update={"overrides": {"pretrain": ("train.epochs=7", "run.seed=3")}})
    _, one, two = load_stages(config)
    assert (one.config.train.epochs, two.config.train.epochs) == (7, 9)
    assert one.config.run.seed == two.config.run.seed == 3
    with pytest.raises(ConfigError, match=r"overrides\.evl"):
        load(PipelineConfig, CONFIGS / "quickstart.toml", ['overrides.evl=["x=1"]'])


def pipeline_with_reward_gate(folder: Path, gate: str, accuracy: float) -> PipelineConfig:
    """Return a pipeline of a finished reward stage and the corpus."""
    overrides = ("run.dir={dir}/reward", "model.name=/model")
    reward = PipelineStage(stage="reward", config=str(CONFIGS / "reward.toml"), overrides=overrides)
    config = PipelineConfig(
        run=RunConfig(dir=str(folder)),
        stages=(reward, pipeline_stage("corpus", "corpus")),
        gates={"reward": (gate,)},
    )
    first, _ = load_stages(config)
    Run.open("pipeline", config, run_dir=str(folder), allow_changes=False)
    run = Run.open("reward", first.config, run_dir=first.config.run.dir, allow_changes=False)
    run.folder.write_json("reward.json", {"pairs": 118, "samples": 118, "accuracy": accuracy})
    run.folder.write_text("report.html", "")
    run.update_manifest(finished=True, seed=0, data={"inputs": [{"xxh128": "0"}]})
    return config


def test_a_reward_gate_is_checked_against_the_interval_of_the_accuracy(tmp_path):
    gate = "low(reward.accuracy) > 0.5"
    run = run_pipeline(pipeline_with_reward_gate(tmp_path / "good", gate, 100 / 118))
    html = run.folder.read_text("report.html")
    assert "✓ passed" in html
    assert "0.847" in html
    # above 0.5, perhaps by chance
    with pytest.raises(GateFailure, match=r"low\(reward\.accuracy\) > 0\.5: 0\.5508 \(0\.46"):
        run_pipeline(pipeline_with_reward_gate(tmp_path / "poor", gate, 65 / 118))
    assert not (tmp_path / "poor" / "corpus").exists()
    assert "✗ failed" in (tmp_path / "poor" / "report.html").read_text("utf-8")
    for wrong in ("reward.accurcy > 0.5", "reward.accuracy > parent", "reward.accuracy"):
        with pytest.raises(ConfigError, match=r"gates\.reward: gate "):
            pipeline_with_reward_gate(tmp_path / "wrong", wrong, 1.0)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_failed_gate_stops_the_pipeline_with_the_evidence(tmp_path, base):
    folder = tmp_path / "run"
    gates = ("nll.general <= 1000", "key_points.x == pass")
    with pytest.raises(GateFailure) as failure:
        run_pipeline(evaluation_stage(folder, base, *gates, overrides=small(tmp_path)))
    assert "failed 1 of 2 gates: key_points.x == pass: 0.0000" in str(failure.value)
    assert not (folder / "corpus").exists()
    html = (folder / "report.html").read_text("utf-8")
    assert html.index("✓ passed") < html.index("✗ failed")
    assert not Run(str(folder)).finished
    easier = run_pipeline(  # gates may change, and what is scored is not scored again
        evaluation_stage(folder, base, "nll.general <= 1000", overrides=small(tmp_path))
    )
    assert easier.finished
    assert (folder / "corpus").exists()
    assert "✗ failed" not in (folder / "report.html").read_text("utf-8")


def test_gates_and_names_that_fit_no_stage_are_errors_before_anything_runs(tmp_path, base):
    config = evaluation_stage(tmp_path, base, overrides=small(tmp_path))
    with pytest.raises(ConfigError, match=r"gates\.score: no eval or .* did you mean scores"):
        load_stages(config.model_copy(update={"gates": {"score": ("nll.general <= 1",)}}))
    with pytest.raises(ConfigError, match=r"stage eval.*no task is called mcq"):
        load_stages(config.model_copy(update={"gates": {"scores": ("mcq.accuracy >= 1",)}}))
    with pytest.raises(ConfigError, match=r"stage eval.*model\.parent is unset"):
        load_stages(config.model_copy(update={"gates": {"scores": ("nll.general <= parent",)}}))
    with pytest.raises(ConfigError, match="two stages are called scores"):
        load_stages(config.model_copy(update={"stages": (config.stages[0],) * 2}))
    nameless = config.stages[0].model_copy(update={"overrides": ("run.dir={dir}/scores",)})
    with pytest.raises(ConfigError, match=r"model\.name is unset"):
        load_stages(config.model_copy(update={"stages": (nameless,)}))

from pathlib import Path

import pytest

from medgpt.config import ConfigError, PipelineConfig, PipelineStage, RunConfig
from medgpt.eval.pipeline import require_answers, run_pipeline
from medgpt.eval.questions import Answer

CORPUS_TOML = Path(__file__).parent.parent.parent / "configs" / "debug" / "corpus.toml"


def pipeline(folder: Path, *overrides: str) -> PipelineConfig:
    stage = PipelineStage(
        stage="corpus", config=str(CORPUS_TOML), overrides=("run.dir={dir}/corpus", *overrides)
    )
    return PipelineConfig(run=RunConfig(dir=str(folder)), stages=(stage,))


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


def answer(kind: str, *stated: bool) -> Answer:
    return Answer(kind, f"{kind}?", "", [["多饮"], ["多尿"]], list(stated))


def test_a_stage_must_have_learnt_its_answer():
    models = {"pretrain": [], "sft": []}
    require_answers([answer("pretrain", True, True), answer("sft", True, True)], models)
    with pytest.raises(ConfigError, match=r"'sft\?' is not answered: the answer lacks 多尿"):
        require_answers([answer("sft", True, False)], models)


def test_other_phrasings_and_later_stages_are_reported_only():
    require_answers([answer("rlhf", False, False), answer("phrasing", False, False)], {"sft": []})
    require_answers([answer("sft", False, False)], {"pretrain": []})  # the stage did not run


def test_knowing_what_was_left_out_is_a_failure():
    require_answers([answer("left_out", True, False)], {})
    with pytest.raises(ConfigError, match="although no training text tells it"):
        require_answers([answer("left_out", True, True)], {})

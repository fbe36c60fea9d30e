import json
from pathlib import Path

from medgpt.config.evaluation import EvalConfig
from medgpt.config.loading import validate
from medgpt.runs import Run
from medgpt.stages.pipeline_stages import LoadedStage
from medgpt.stages.pipeline_summary import print_summary

QUESTION = "请解释冠状动脉粥样硬化的发病机制"


def evaluated_stage(folder: Path, name: str, answer: str, *, untrained: bool) -> LoadedStage:
    """Write an evaluation with one question, one that is not shown, and two gates."""
    model = {"name": str(folder / "model"), "untrained": untrained}
    tree = {"run": {"dir": str(folder / name)}, "model": model, "nll": [{"general": True}]}
    run = Run(str(folder / name))
    run.folder.write_json("results.json", {"tasks": {"questions": {"kind": "key_points"}}})
    items = [
        {"slices": {"kind": "sft"}, "shown": {"question": QUESTION, "answer": answer}},
        {"slices": {"kind": "phrasing"}, "shown": {"question": "另一个问题", "answer": answer}},
    ]
    lines = (json.dumps({"id": str(i), "values": {}, **item}) for i, item in enumerate(items))
    (run.folder / "items").write_text("questions.jsonl", "\n".join(lines) + "\n")
    run.folder.write_json("gates.json", [{"passed": True}, {"passed": not untrained}])
    return LoadedStage(name, "eval", validate(EvalConfig, tree))


def test_the_summary_shows_answers_gates_and_next_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stages = [
        evaluated_stage(tmp_path, "base", "认" * 500, untrained=True),
        evaluated_stage(tmp_path, "after-ppo", "脂质沉积\n形成斑块", untrained=False),
    ]
    print_summary(Run(str(tmp_path)), stages)
    output = capsys.readouterr().out
    assert "before training" in output
    assert "final model (after-ppo)" in output
    assert output.count("认") < 30
    assert "脂质沉积 形成斑块" in output
    assert "另一个问题" not in output
    assert "pipeline: gates: 3 of 4 passed" in output
    assert f"pipeline: report in {tmp_path}/report.html" in output
    assert "medgpt eval YOUR_MODEL after-ppo/config.toml run.dir=runs/my-eval 'gates=[]'" in output

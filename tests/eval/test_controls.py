"""The quickstart's gates separate a model that learnt from ones that cannot know."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.ray]


def quickstart(folder: Path, *changes: tuple[int, str]) -> tuple[int, str]:
    """Exit status and errors of the quickstart with more overrides for its stages."""
    from medgpt.config import PipelineConfig, load

    path = ROOT / "configs" / "debug" / "quickstart.toml"
    stages = load(PipelineConfig, path).stages
    overrides = []
    for number, text in changes:
        values = json.dumps([*stages[number].overrides, text], ensure_ascii=False)
        overrides.append(f"stages.{number}.overrides={values}")
    command = [sys.executable, "-m", "medgpt", "pipeline", str(path), f"run.dir={folder}"]
    done = subprocess.run([*command, *overrides], cwd=ROOT, capture_output=True, text=True)
    assert (folder / "report.html").exists(), done.stderr[-2000:]
    return done.returncode, done.stderr


def passed(folder: Path, stage: str, kind: str) -> list[float]:
    """Of the questions of a kind: whether the greedy and all sampled answers state the facts."""
    results: dict[str, Any] = json.loads((folder / stage / "results.json").read_text("utf-8"))
    score = results["tasks"]["key_points"]["slices"]["kind"][kind]["greedy_passed"]
    return [score["value"], score["n"]]


def test_the_quickstart_passes_its_gates(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    status, errors = quickstart(folder)

    assert (status, errors) == (0, "")
    assert passed(folder, "after-pretrain", "pretrain") == [1.0, 1]
    assert passed(folder, "after-sft", "sft") == [1.0, 1]
    assert passed(folder, "after-sft", "phrasing")[0] >= 0.66
    assert passed(folder, "after-sft", "left_out") == [0.0, 3]


def test_a_model_of_swapped_facts_fails(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    status, errors = quickstart(folder, (0, "swap_facts=true"))

    assert status != 0
    assert "gates: key_points.diabetes.greedy_passed == pass: 0.0000" in errors
    assert passed(folder, "after-pretrain", "pretrain") == [0.0, 1]
    assert not (folder / "sft").exists()


def test_an_untrained_model_fails(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    status, errors = quickstart(folder, (1, "train.max_steps=1"))

    assert status != 0
    assert "gates: key_points.diabetes.greedy_passed == pass: 0.0000" in errors
    assert not (folder / "sft").exists()

"""The quickstart's questions separate a model that learnt from ones that cannot know."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.ray]


def quickstart(folder: Path, *changes: tuple[int, str]) -> tuple[int, str, list[dict[str, Any]]]:
    """Exit status, errors and answers of the quickstart with more overrides for its stages."""
    from medgpt.config import PipelineConfig, load

    path = ROOT / "configs" / "debug" / "quickstart.toml"
    stages = load(PipelineConfig, path).stages
    overrides = []
    for number, text in changes:
        values = json.dumps([*stages[number].overrides, text], ensure_ascii=False)
        overrides.append(f"stages.{number}.overrides={values}")
    command = [sys.executable, "-m", "medgpt", "pipeline", str(path), f"run.dir={folder}"]
    done = subprocess.run([*command, *overrides], cwd=ROOT, capture_output=True, text=True)
    answers = folder / "answers.json"
    assert answers.exists(), done.stderr[-2000:]
    return done.returncode, done.stderr, json.loads(answers.read_text("utf-8"))


def passed(answers: list[dict[str, Any]], kind: str) -> list[bool]:
    return [all(answer["stated"]) for answer in answers if answer["kind"] == kind]


def test_the_quickstart_answers_and_does_not_know_what_was_left_out(tmp_path: Path) -> None:
    status, errors, answers = quickstart(tmp_path / "run")

    assert (status, errors) == (0, "")
    assert passed(answers, "pretrain") == passed(answers, "sft") == [True]
    assert sum(passed(answers, "phrasing")) >= 20
    assert not any(passed(answers, "left_out"))


def test_a_model_of_swapped_facts_fails(tmp_path: Path) -> None:
    status, errors, answers = quickstart(tmp_path / "run", (0, "swap_facts=true"))

    assert status != 0
    assert "is not answered" in errors
    assert not any(passed(answers, "pretrain") + passed(answers, "sft"))
    assert sum(passed(answers, "phrasing")) <= 3


def test_an_untrained_model_fails(tmp_path: Path) -> None:
    few = "train.max_steps=1"
    status, errors, answers = quickstart(tmp_path / "run", (1, few), (2, few))

    assert status != 0
    assert "is not answered" in errors
    assert not any(passed(answers, "pretrain") + passed(answers, "sft"))
    assert not any(passed(answers, "phrasing"))

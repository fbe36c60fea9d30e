"""Reports of evaluations, from run directories as an evaluation leaves them."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from medgpt.eval.evaluate import summary
from medgpt.eval.pipeline_report import read_column, write_eval_report, write_pipeline_report
from medgpt.eval.scores import tables
from medgpt.eval.task import Judged
from medgpt.runs import Run, commit, committed, entries
from medgpt.train.card import SCORES, add_scores

SECRET = "病人张三的原话"
RESOURCE = re.compile(
    r"""(?:src|href|action)\s*=\s*["']?(?:https?:)?//|url\(\s*["']?http|@import|<script"""
)


class FakeTask:
    def __init__(self, name: str, kind: str, data_hash: str) -> None:
        self.name, self.kind, self.data_hash = name, kind, data_hash
        self.template, self.sensitive = f"{kind}-1", False


def item(number: int, right: bool, department: str) -> Judged:
    shown = {"question": f"问题{number}<b>", "answer": f"答案{number}", "right": "A"}
    return Judged(f"q{number}", {"accuracy": float(right)}, {"department": department}, shown)


def make_evaluation(
    folder: Path, right: int, *, data_hash: str = "d1", parent: str | None = None
) -> Run:
    """40 questions, the first `right` of which are answered, and a sensitive task."""
    run = Run(str(folder))
    items = {
        "mcq": [item(i, i < right, "儿科" if i % 2 else "内科") for i in range(40)],
        "secret": [replace(item(i, True, "x"), shown={}) for i in range(4)],
    }
    tasks = {}
    for name, judged in items.items():
        lines = "".join(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in judged)
        (run.folder / "items").write_text(f"{name}.jsonl", lines)
        tasks[name] = summary(FakeTask(name, "mcq", data_hash), judged, seed=0)  # type: ignore[arg-type]
    results = {"model": "m", "parent": parent, "seed": 0, "tasks": tasks}
    run.folder.write_json("results.json", results)
    gate = {"gate": "mcq.accuracy >= 0.5", "passed": right >= 20, "value": right / 40}
    run.folder.write_json(
        "gates.json", [{**gate, "low": 0.1, "high": 0.9, "n": 40, "bound": 0.5, "parent": None}]
    )
    run.folder.write_text("config.toml", "[run]\n")
    run.update_manifest(
        **{"stage": "eval", "started": "2026-01-02T03:04:05Z", "git_sha": None, "versions": {}},
        hardware={"machine": "x86_64", "cpus": 2, "memory_gb": 23.5},
    )
    return run


def test_columns_are_compared_on_the_same_items(tmp_path):
    before = make_evaluation(tmp_path / "a", 10)
    after = make_evaluation(tmp_path / "b", 30)
    other = make_evaluation(tmp_path / "c", 30, data_hash="d2")
    columns = [read_column(n, r) for n, r in (("a", before), ("b", after), ("c", other))]
    mcq, secret = tables(columns, seed=0)
    (row,) = mcq.rows
    assert [score and score["value"] for score in row.scores] == [0.25, 0.75, 0.75]
    first, change, incomparable = row.changes
    assert first is incomparable is None
    assert change is not None
    assert (change.n, change.verdict, change.difference.value) == (40, "higher", 0.5)
    assert change.p_value == pytest.approx(2 * 0.5**20)
    (slices,) = mcq.slices
    assert [value for value, _ in slices.values] == ["儿科", "内科"]
    assert [a.score for a in mcq.best] == [1.0] * 3
    assert [a.score for a in mcq.worst] == [0.0] * 3
    assert [name for name, _ in mcq.best[0].shown] == ["a", "b", "c"]
    assert secret.best == secret.worst == []


def test_a_pipeline_report_has_all_evaluations_side_by_side(tmp_path):
    pipeline = Run(str(tmp_path / "all"))
    runs = {
        "after-pretrain": make_evaluation(tmp_path / "all" / "one", 10),
        "after-sft": make_evaluation(tmp_path / "all" / "two", 30),
    }
    write_pipeline_report(pipeline, runs)
    html = pipeline.folder.read_text("report.html")
    assert 'href="one/report.html"' in html
    for text in ("0.250", "0.750", "+0.500", "n=40", "McNemar", "✓ passed", "✗ failed", "儿科"):
        assert text in html
    assert "问题0&lt;b&gt;" in html
    assert "<b>问题" not in html
    assert not RESOURCE.search(html)
    written = (tmp_path / "all" / "report.html").stat().st_mtime_ns
    write_pipeline_report(pipeline, runs)
    assert (tmp_path / "all" / "report.html").stat().st_mtime_ns == written


def test_an_evaluation_is_shown_beside_its_parent(tmp_path):
    parent = make_evaluation(tmp_path / "before", 10)
    run = make_evaluation(tmp_path / "now", 30, parent=parent.folder.url)
    write_eval_report(run)
    html = run.folder.read_text("report.html")
    assert html.startswith("<!doctype html>")
    for text in ("parent", "0.250", "0.750", "+0.500"):
        assert text in html
    assert not RESOURCE.search(html)
    found = run.folder.read_json("comparison.json")["mcq"]["accuracy"]
    assert (found["ours"], found["theirs"], found["n"], found["verdict"]) == (
        0.75,
        0.25,
        40,
        "higher",
    )
    assert found["p_value"] == pytest.approx(2 * 0.5**20)
    assert found["difference"]["low"] > 0


def test_the_card_of_the_model_gets_the_numbers_once(tmp_path):
    run = Run(str(tmp_path / "run"))
    with run.model.staging() as directory:
        (directory / "README.md").write_text("# run\n\nNot a doctor.\n", "utf-8")
        (directory / "model.safetensors").write_bytes(b"0")
        commit(run.model, entries(directory), step=3)
    for right in (10, 30):
        results = make_evaluation(tmp_path / f"eval-{right}", right).folder.read_json(
            "results.json"
        )
        add_scores({**results, "model": run.folder.url})
        card = run.model.read_text("README.md")
        assert card.count(SCORES) == 1
        assert f"| mcq | accuracy | {right / 40:.4f} |" in card
        manifest = committed(run.model, verify=True)
        assert manifest is not None
        assert manifest["step"] == 3
    add_scores({**results, "model": "owner/name"})  # no run: nothing to write to

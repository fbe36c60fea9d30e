"""Reports of evaluations, from run directories that a test writes."""

import json
import re
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from medgpt.artifacts import commit, committed, file_entries
from medgpt.eval.summary import summarize_task
from medgpt.eval.task import ItemResult
from medgpt.eval.tasks.text_metrics import corpus_counts, corpus_score
from medgpt.reports.evaluation import load_eval_column, write_eval_report
from medgpt.reports.pipeline import write_pipeline_report
from medgpt.reports.scores import build_task_tables
from medgpt.runs import Run
from medgpt.train.model_card import SCORES_HEADING, add_scores

SECRET = "病人张三的原话"
RESOURCE = re.compile(
    r"""(?:src|href|action)\s*=\s*["']?(?:https?:)?//|url\(\s*["']?http|@import|<script"""
)


class FakeTask:
    def __init__(self, name: str, kind: str, data_hash: str, template: str) -> None:
        self.name, self.kind, self.data_hash = name, kind, data_hash
        self.template, self.rules, self.sensitive = template, "r1", False


def item(number: int, right: bool, department: str) -> ItemResult:
    shown = {"question": f"问题{number}<b>", "answer": f"答案{number}", "right": "A"}
    return ItemResult(f"q{number}", {"accuracy": float(right)}, {"department": department}, shown)


def make_evaluation(
    folder: Path,
    right: int,
    *,
    data_hash: str = "d1",
    template: str = "mcq-1",
    parent: str | None = None,
) -> Run:
    """Write an evaluation of 40 questions, the first `right` answered correctly, and a sensitive
    task."""
    run = Run(str(folder))
    items = {
        "mcq": [item(i, i < right, "儿科" if i % 2 else "内科") for i in range(40)],
        "secret": [replace(item(i, True, "x"), shown={}) for i in range(4)],
    }
    tasks = {}
    for name, judged in items.items():
        lines = "".join(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in judged)
        (run.folder / "items").write_text(f"{name}.jsonl", lines)
        task = FakeTask(name, "mcq", data_hash, template)
        tasks[name] = summarize_task(task, judged, seed=0)  # type: ignore[arg-type]
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
    columns = [load_eval_column(n, r) for n, r in (("a", before), ("b", after), ("c", other))]
    mcq, secret = build_task_tables(columns, seed=0)
    (row,) = mcq.rows
    assert [score and score["value"] for score in row.scores] == [0.25, 0.75, 0.75]
    first, change, incomparable = row.changes
    assert first is incomparable is None
    assert change is not None
    assert (change.n, change.verdict, change.difference.value) == (40, "higher", 0.5)
    assert row.verdicts == ["", "better", ""]
    assert change.p_value == pytest.approx(2 * 0.5**20)
    (slices,) = mcq.slices
    assert [value for value, _ in slices.values] == ["儿科", "内科"]
    assert [a.score for a in mcq.best] == [1.0] * 3
    assert [a.score for a in mcq.worst] == [0.0] * 3
    assert [name for name, _ in mcq.best[0].shown] == ["a", "b", "c"]
    assert secret.best == secret.worst == []


def test_columns_with_different_prompts_are_not_compared(tmp_path):
    letters = make_evaluation(tmp_path / "letters", 10, template="mcq-letter")
    texts = make_evaluation(tmp_path / "texts", 30, template="mcq-option")
    table, _ = build_task_tables(
        [load_eval_column("a", letters), load_eval_column("b", texts)], seed=0
    )
    assert [row.changes for row in table.rows] == [[None, None]]
    assert table.facts[-1] == "b is not compared with a, which used another prompt"


def evaluation_of_texts(texts: list[str], folder: Path) -> Run:
    """Write an evaluation of answers against one reference."""
    counted = corpus_counts(texts, ["多饮、多尿、多食和体重下降"] * len(texts))
    items = [
        ItemResult(f"q{i}", {"words": float(len(text))}, counts=part)
        for i, (text, part) in enumerate(zip(texts, counted, strict=True))
    ]
    run = Run(str(folder))
    lines = "".join(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in items)
    (run.folder / "items").write_text("said.jsonl", lines)
    task = FakeTask("said", "generation", "d", "t")
    values = {
        metric: corpus_score(metric, [item.counts for item in items], 0)._asdict()
        | {"n": len(items)}
        for metric in ("bleu_2", "distinct_1")
    }
    part = summarize_task(task, items, seed=0)  # type: ignore[arg-type]
    part["metrics"] |= values
    run.folder.write_json("results.json", {"tasks": {"said": part}, "seed": 0})
    return run


def test_corpus_level_scores_have_a_paired_bootstrap(tmp_path):
    tails = ["胸痛咳嗽", "头晕恶心", "乏力", "失眠多梦", "皮疹瘙痒", "心悸", "咽痛鼻塞", "腹泻便血"]
    good = [f"多饮、多尿{'、多食' * (i % 2)}，{tail}" for i, tail in enumerate(tails)]
    before = evaluation_of_texts(["不知道，请多喝热水", "没有，多喝热水"] * 4, tmp_path / "before")
    now = evaluation_of_texts(good, tmp_path / "now")
    (table,) = build_task_tables(
        [load_eval_column("before", before), load_eval_column("now", now)], seed=0
    )
    changes = {row.metric: row.changes[1] for row in table.rows}
    for metric in ("bleu_2", "distinct_1"):
        change = changes[metric]
        assert change is not None
        assert change.n == 8
        assert change.difference.value == pytest.approx(change.ours - change.theirs)
        assert change.difference.low < change.difference.value < change.difference.high
        assert (change.verdict, change.p_value) == ("higher", None)
    same = build_task_tables([load_eval_column("a", now), load_eval_column("b", now)], seed=0)[0]
    assert {row.metric: row.changes[1].verdict for row in same.rows} == dict.fromkeys(
        changes, "same"
    )
    assert [changes[m].margin for m in ("bleu_2", "distinct_1", "words")] == [1.0, 0.01, 0.0]


def test_a_pipeline_report_has_all_evaluations_side_by_side(tmp_path):
    pipeline = Run(str(tmp_path / "all"))
    runs = {
        "after-pretrain": make_evaluation(tmp_path / "all" / "one", 10),
        "after-sft": make_evaluation(tmp_path / "all" / "two", 30),
    }
    write_pipeline_report(pipeline, runs)
    html = pipeline.folder.read_text("report.html")
    assert 'href="one/report.html"' in html
    for text in (
        "0.250",
        "0.750",
        "+0.500",
        "✓ better",
        "n=40",
        "McNemar",
        "✓ passed",
        "✗ failed",
        "儿科",
    ):
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
    accuracy = run.folder.read_json("comparison.json")["mcq"]["accuracy"]
    assert (accuracy["ours"], accuracy["theirs"], accuracy["n"], accuracy["verdict"]) == (
        0.75,
        0.25,
        40,
        "higher",
    )
    assert accuracy["p_value"] == pytest.approx(2 * 0.5**20)
    assert accuracy["difference"]["low"] > 0


def test_the_card_of_the_model_gets_the_numbers_once(tmp_path):
    run = Run(str(tmp_path / "run"))
    with run.model.staging() as directory:
        (directory / "README.md").write_text("# run\n\nNot a doctor.\n", "utf-8")
        (directory / "model.safetensors").write_bytes(b"0")
        commit(run.model, file_entries(directory), step=3)
    for right in (10, 30):
        results = make_evaluation(tmp_path / f"eval-{right}", right).folder.read_json(
            "results.json"
        )
        add_scores({**results, "model": run.folder.url})
        card = run.model.read_text("README.md")
        assert card.count(SCORES_HEADING) == 1
        assert f"| mcq | accuracy | {right / 40:.4f} |" in card
        manifest = committed(run.model, verify=True)
        assert manifest is not None
        assert manifest["step"] == 3
    add_scores({**results, "model": "owner/name"})  # no run: nothing to write to
    for name in (run.folder.url, run.model.url):  # a run, or its model
        results["tasks"]["mcq"]["metrics"]["accuracy"]["value"] += 0.01
        add_scores({**results, "model": name})
        value = results["tasks"]["mcq"]["metrics"]["accuracy"]["value"]
        assert f"| mcq | accuracy | {value:.4f} |" in run.model.read_text("README.md")


class SimulatedKill(Exception):
    pass


def test_a_kill_while_the_card_is_written_leaves_a_complete_model(tmp_path):
    class Dying(LocalFileSystem):
        """Raise before the n-th write, like a process that is killed."""

        protocol = ("dying",)
        left = 0

        def pipe_file(self, path, value, mode="overwrite", **kwargs):
            if not Dying.left:
                raise SimulatedKill
            Dying.left -= 1
            Path(path).write_bytes(value)

    fsspec.register_implementation("dying", Dying, clobber=True)
    results = make_evaluation(tmp_path / "eval", 10).folder.read_json("results.json")
    for writes in range(3):
        folder = tmp_path / f"run-{writes}"
        run = Run(str(folder))
        with run.model.staging() as directory:
            (directory / "README.md").write_text("# run\n", "utf-8")
            commit(run.model, file_entries(directory), step=3)
        Dying.left = writes
        with suppress(SimulatedKill):
            add_scores({**results, "model": f"dying://{folder}"})
        assert committed(run.model, verify=True)
    assert SCORES_HEADING in run.model.read_text("README.md")

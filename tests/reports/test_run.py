import json
import re
from pathlib import Path

import pytest
import tomli_w

from medgpt.reports.pipeline import write_pipeline_report
from medgpt.reports.run import MAX_POINTS, downsample, write_run_report
from medgpt.runs import Run

SECRET = "病人张三的原话"
RESOURCE = re.compile(
    r"""(?:src|href|action)\s*=\s*["']?(?:https?:)?//|url\(\s*["']?http|@import|<script"""
)


def make_run(folder: Path, *, steps: int = 30) -> Run:
    """Write a finished run directory with numbers that a test can recompute."""
    run = Run(str(folder))
    run.folder.write_text("config.toml", tomli_w.dumps({"run": {"dir": "<b>dir</b>"}}))
    account = {"licence": "MIT", "sensitive": True, "rows": 1002, "train": 980, "validation": 20}
    set_aside = {"deny-list: <i>rule</i>": 2}
    totals = {
        "num_samples": 980,
        "num_chunks": 1000,
        "num_tokens": 50_000,
        "dropped_tail_tokens": 7,
    }
    run.update_manifest(
        **{"stage": "sft", "seed": 3, "started": "2026-01-02T03:04:05Z", "attempt": 1},
        **{"git_sha": None, "parents": ["runs/pretrain/model"], "world_size": 2},
        vocabulary={
            **{"num_tokens": 12_345, "num_new_tokens": 678, "mean_old_tokens": 2.34},
            "loss": {"before": 3.25, "after": 3.3125, "num_targets": 456},
        },
        versions={"medgpt": "0.1.0", "torch": "2.13.0"},
        hardware={"machine": "x86_64", "cpus": 2, "memory_gb": 23.5},
        data={
            **totals,
            "sources": {
                "clinic": {**account, "set_aside": set_aside, "unused": {"column <id>": 1002}}
            },
            "tokens_by_source": {"clinic": 50_000},
            "validation": {**totals, "num_samples": 20},
        },
    )
    lines = [{"step": 0, "time_s": 1.0, "attempt": 1, "validation/loss": 8.0}]
    for step in range(1, steps + 1):
        line = {"step": step, "time_s": 60.0 * step, "attempt": 1, "train/loss": 8.0 / step}
        numbers = {"train/tokens": 100, "train/tokens_per_s": 10.0 * step, "train/grad_norm": 1.0}
        lines.append({**line, **numbers, "train/learning_rate": 1e-3})
    lines.append({"step": steps, "time_s": 60.0 * steps, "attempt": 1, "validation/loss": 0.5})
    run.folder.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    samples = [{"prompt": "什么是<偏头痛>?", "text": "<script>alert(1)</script>一种头痛。"}]
    run.folder.write_json("samples.json", samples)
    (run.folder / "rejected").write_text("clinic.jsonl", SECRET)
    run.data.write_text("part.jsonl", SECRET)
    return run


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = make_run(tmp_path_factory.mktemp("runs") / "night")
    write_run_report(run)
    return run.folder.read_text("report.html")


def test_a_report_shows_the_numbers_of_the_run(html):
    for text in ("night", "30", "3,000", "30.0 min", "8.0000 to 0.5000", "160", "980", "1,002"):
        assert text in html
    for text in (
        "2 · deny-list",
        "1,002 · column &lt;id&gt;",
        "(sensitive)",
        "2 · deny-list",
        "50,000",
        "seed 3",
        "from runs/pretrain/model",
        "12,345 tokens, 678 of them not in the base model",
        "3.2500 with the old vocabulary, 3.3125 with the new one (+0.0625 nats per token)",
    ):
        assert text in html


def test_a_report_is_self_contained(html):
    assert html.startswith("<!doctype html>")
    assert html.count("<svg") == 4
    assert not RESOURCE.search(html)
    assert len(html) < 200_000


def test_generated_text_is_escaped(html):
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;一种头痛。" in html
    assert "什么是&lt;偏头痛&gt;?" in html
    assert "<i>rule</i>" not in html
    assert "<b>dir</b>" not in html


def test_a_report_shows_no_rows_of_the_data(html):
    assert SECRET not in html


def test_a_run_without_metrics_and_samples_has_a_report(tmp_path):
    run = make_run(tmp_path / "bare")
    for name in ("metrics.jsonl", "samples.json"):
        Path(run.folder.path(name)).unlink()
    write_run_report(run)
    html = run.folder.read_text("report.html")
    assert "<svg" not in html
    assert "Samples" not in html


def test_long_curves_are_downsampled_and_keep_their_mean(tmp_path):
    points = [(step, float(step % 7)) for step in range(10 * MAX_POINTS)]
    thin = downsample(points)
    assert len(thin) == MAX_POINTS
    assert thin[0] == pytest.approx((4.5, sum(x % 7 for x in range(10)) / 10))
    assert sum(v for _, v in thin) / len(thin) == pytest.approx(
        sum(v for _, v in points) / len(points)
    )
    assert downsample(points[:MAX_POINTS]) == points[:MAX_POINTS]
    assert downsample([]) == []
    run = make_run(tmp_path / "long", steps=20_000)
    write_run_report(run)
    assert len(run.folder.read_text("report.html")) < 300_000


def test_the_same_run_has_the_same_report(html, tmp_path):
    run = make_run(tmp_path / "night")
    write_run_report(run)
    assert run.folder.read_text("report.html") == html


def test_a_pipeline_report_links_its_stages(tmp_path):
    pipeline = Run(str(tmp_path / "all"))
    inside, outside = make_run(tmp_path / "all" / "pretrain"), make_run(tmp_path / "elsewhere")
    write_pipeline_report(pipeline, {"pretrain": inside, "sft": outside})
    html = pipeline.folder.read_text("report.html")
    assert 'href="pretrain/report.html"' in html
    assert f'href="{tmp_path}/elsewhere/report.html"' in html
    assert not RESOURCE.search(html)
    assert SECRET not in html

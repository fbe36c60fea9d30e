import json
import re
from pathlib import Path

import pytest
import tomli_w

from medgpt.reports.ppo import ROLLOUT_SAMPLES, write_ppo_report
from medgpt.runs import Run
from tests.reports.test_run import RESOURCE

RULES = ("urgency", "dose", "diagnosis", "hotline", "language", "repetition")


def make_ppo_run(folder: Path, *, iterations: int = 20) -> Run:
    """Write a PPO run with numbers that a test can recompute."""
    run = Run(str(folder))
    run.folder.write_text("config.toml", tomli_w.dumps({"run": {"dir": "<b>dir</b>"}}))
    run.update_manifest(
        **{"stage": "ppo", "seed": 3, "started": "2026-01-02T03:04:05Z", "attempt": 1},
        **{"git_sha": "0123456789abcdef", "parents": ["runs/sft/model", "runs/reward/model"]},
        versions={"medgpt": "0.1.0", "torch": "2.13.0"},
        hardware={"machine": "x86_64", "cpus": 2, "memory_gb": 23.5},
    )
    lines = [_line(step) for step in range(1, iterations + 1)]
    run.folder.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    components = {"score": 1.25, "urgency": -1.0, "mine": None}
    run.folder.write_json(
        ROLLOUT_SAMPLES,
        [
            {
                "iteration": iteration,
                "prompt": "我最近<b>总是</b>头痛?",
                "answer": answer,
                "total": total,
                "components": components,
            }
            for iteration, answer, total in ((10, "可能是偏头痛。", 1.5), (1, "", None))
        ],
    )
    return run


def _line(step: int) -> dict[str, float]:
    line = {"step": step, "time_s": 6.0 * step, "attempt": 1, "ppo/score_mean": 0.1 * step}
    line |= {"actor/kl_ref": 0.3 * step, "actor/entropy": 1 / step, "rewards/masked": 0.25}
    line |= {"rollout/response_tokens": 40 + step, "ppo/samples_per_s": 5.0, "ppo/steps": 4}
    line |= {"rewards/total": 0.1 * step, "rewards/capped": 0.5 / step, "ppo/skipped_steps": 0}
    for name in ("score", *RULES):
        line |= {f"rewards/{name}": -1.0 / step, f"rewards/{name}_masked": 0.0}
    line |= {f"rewards/{name}_violations": 1.0 / step for name in RULES}
    phases = {"generate": 3.0, "score": 1.0, "update": 1.5, "sync": 0.25, "wait": 0.25}
    line |= {f"time/{name}_s": seconds for name, seconds in phases.items()}
    if step % 10 == 0:
        line |= {"judge/checks": step / 40, "judge/checks_se": 0.05, "judge/score": 1.0}
    return {**line, "time/iteration_s": 6.0, "critic/explained_variance": 0.5}


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    run = make_ppo_run(tmp_path_factory.mktemp("ppo"))
    write_ppo_report(run)
    return run.folder.read_text("report.html")


def row_cells(html: str, first: str) -> list[str]:
    """Return the cells of the table row that starts with `first`."""
    row = next(r for r in re.findall(r"<tr>.*?</tr>", html, re.DOTALL) if f"<td>{first}</td>" in r)
    texts = re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)
    return [re.sub(r"<[^>]+>", "", text).strip() for text in texts]


def test_scores_before_and_after_are_means_of_the_first_and_last_iterations(html):
    assert row_cells(html, "score in training") == [
        "score in training",
        "0.300",
        "1.800",
        "+1.500 ✓ better",
    ]
    judged = ["held-out checks", "0.250 ± 0.050", "0.500 ± 0.050", "+0.250 ✓ better"]
    assert row_cells(html, "held-out checks") == judged


def test_changes_are_marked_by_the_direction_of_their_metric(tmp_path):
    run = make_ppo_run(tmp_path, iterations=0)
    lines = [
        {
            "step": 0,
            "attempt": 1,
            "judge/triage_under": 0.83,
            "judge/score": 1.0,
            "judge/score_se": 0.1,
        },
        {
            "step": 9,
            "attempt": 1,
            "judge/triage_under": 1.00,
            "judge/score": 0.9,
            "judge/score_se": 0.1,
        },
    ]
    lines[0] |= {"judge/triage_over": 0.5, "rollout/response_tokens": 40.0}
    lines[1] |= {"judge/triage_over": 0.2, "rollout/response_tokens": 90.0}
    run.folder.write_text("metrics.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
    write_ppo_report(run)
    html = run.folder.read_text("report.html")
    assert row_cells(html, "red flags missed ↓")[-1] == "+0.170 ✗ worse"
    assert row_cells(html, "sent to emergency without need ↓")[-1] == "-0.300 ✓ better"
    assert row_cells(html, "held-out reward model")[-1] == "-0.100"  # within the standard errors
    assert row_cells(html, "tokens of an answer")[-1] == "+50.000"
    assert '<span class="worse">✗ worse</span>' in html


def test_phases_add_up_to_the_iteration(html):
    assert [
        row_cells(html, name)[1:3] for name in ("generate", "score", "update", "sync", "wait")
    ] == [
        ["3.00", "50 %"],
        ["1.00", "17 %"],
        ["1.50", "25 %"],
        ["0.25", "4 %"],
        ["0.25", "4 %"],
    ]


def test_every_component_has_its_curve(html):
    figures = re.findall(r"<figure><figcaption>(.*?)</figcaption>(.*?)</figure>", html, re.DOTALL)
    drawn = dict(figures)
    assert set(drawn) >= {"Score", "Reward components", "Rule violations", "Judge", "Answers"}
    assert all(f">{name}<" in drawn["Reward components"] for name in ("score", *RULES))
    assert all(f">{name}<" in drawn["Rule violations"] for name in RULES)


def test_rollouts_are_shown_earliest_first_with_failed_components(html):
    answers = re.findall(r"<blockquote.*?</blockquote>", html, re.DOTALL)
    assert "iteration 1 · no reward" in answers[0]
    assert "(empty)" in answers[0]
    assert "iteration 10 · reward 1.500" in answers[1]
    assert "可能是偏头痛。" in answers[1]
    assert "mine failed" in answers[1]


def test_texts_are_escaped_and_no_external_resource_is_loaded(html):
    assert "我最近&lt;b&gt;总是" in html
    assert not RESOURCE.search(html)


def test_the_report_of_a_diverged_run_shows_the_reason(tmp_path):
    run = make_ppo_run(tmp_path, iterations=2)
    run.update_manifest(diverged="answers grew from 20 to 90 tokens")
    write_ppo_report(run)
    assert "answers grew from 20 to 90 tokens" in run.folder.read_text("report.html")


def test_a_run_without_iterations_has_a_report(tmp_path):
    run = make_ppo_run(tmp_path, iterations=0)
    write_ppo_report(run)
    assert "<h1>" in run.folder.read_text("report.html")
